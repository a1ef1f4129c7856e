// soloist worker: one rank of a cluster, or all of a host's ranks as children.
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <csignal>
#include <cstdlib>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <thread>
#include <vector>

#include "absl/strings/numbers.h"
#include "base/host_limits.h"
#include "base/status.h"
#include "cli/flags.h"
#include "engine/cluster/comm_factory.h"
#include "engine/cluster/local_workers.h"
#include "engine/cluster/worker_process.h"
#include "server/version.h"

namespace soloist::cli {
namespace {

constexpr int kDefaultPort = 50052;

struct WorkerFlags {
  WorkerProcessOptions worker;
  CommPlace comm;
  std::string device = "cpu";
  std::string comm_ports;
  std::optional<int> rank;
  std::optional<int> local_index;
  int ranks_per_worker = 1;
  int leader_port = kDefaultPort;
  double leader_timeout_s = 60;
  int parent = 0;
  bool check_flags = false;
};

absl::StatusOr<int> ParseNumber(std::string_view text, std::string_view what) {
  int number = 0;
  if (!absl::SimpleAtoi(absl::string_view(text.data(), text.size()), &number) || number < 0) {
    return InvalidArgument("{} is '{}', expected a number", what, text);
  }
  return number;
}

// "cuda:3" -> cuda and 3.
absl::Status ParseDevice(WorkerFlags& flags) {
  const size_t colon = flags.device.find(':');
  flags.worker.device.kind = flags.device.substr(0, colon);
  if (colon != std::string::npos) {
    ASSIGN_OR_RETURN(flags.worker.device_index,
                     ParseNumber(std::string_view(flags.device).substr(colon + 1), "--device: the index"));
  } else if (flags.worker.device.kind == "cuda") {
    flags.worker.device_index = flags.local_index.value_or(0);
  }
  return absl::OkStatus();
}

// "6000-6015" -> 6000 and 6015.
absl::Status ParsePorts(WorkerFlags& flags) {
  if (flags.comm_ports.empty()) return absl::OkStatus();
  const std::string_view text = flags.comm_ports;
  const size_t dash = text.find('-');
  if (dash == std::string_view::npos) return InvalidArgument("--comm-ports is '{}', expected FIRST-LAST", text);
  ASSIGN_OR_RETURN(flags.comm.port_begin, ParseNumber(text.substr(0, dash), "--comm-ports: the first"));
  ASSIGN_OR_RETURN(flags.comm.port_end, ParseNumber(text.substr(dash + 1), "--comm-ports: the last"));
  if (flags.comm.port_begin < 1 || flags.comm.port_end < flags.comm.port_begin || flags.comm.port_end > 65535) {
    return InvalidArgument("--comm-ports is '{}', allowed: 1 to 65535, the first not above the last", text);
  }
  return absl::OkStatus();
}

absl::StatusOr<std::optional<int>> NumberOf(const char* variable) {
  const char* text = std::getenv(variable);
  if (text == nullptr) return std::nullopt;
  ASSIGN_OR_RETURN(const int number, ParseNumber(text, variable));
  return number;
}

// What flags do not say comes from LeaderWorkerSet's variables: rank = pod's index * ranks per pod + index in the pod.
absl::Status Complete(WorkerFlags& flags) {
  if (flags.worker.leader.empty()) {
    const char* host = std::getenv("LWS_LEADER_ADDRESS");
    if (host == nullptr) return InvalidArgument("--leader is missing, and LWS_LEADER_ADDRESS is not set");
    flags.worker.leader = fmt::format("{}:{}", host, flags.leader_port);
  }
  ASSIGN_OR_RETURN(const auto pod, NumberOf("LWS_WORKER_INDEX"));
  ASSIGN_OR_RETURN(const auto pods, NumberOf("LWS_GROUP_SIZE"));
  if (flags.rank.has_value()) {
    flags.worker.rank = *flags.rank;
  } else if (pod.has_value()) {
    flags.worker.rank = *pod * flags.ranks_per_worker + flags.local_index.value_or(0);
  }
  if (pods.has_value()) flags.worker.group_size = *pods * flags.ranks_per_worker;
  return absl::OkStatus();
}

// Ends at once: the leader sees the stream break.
void OnSignal(int) { _exit(0); }

std::atomic<bool> stop_requested = false;
void OnParentSignal(int) { stop_requested = true; }

// All ranks of this host, a child each; the exit status.
absl::StatusOr<int> RunChildren(const WorkerFlags& flags) {
  const int count = flags.ranks_per_worker;
  const int threads = flags.worker.device.cpu_threads > 0 ? flags.worker.device.cpu_threads : UsableCores();
  std::vector<std::string> common = {
      "worker",
      "--leader=" + flags.worker.leader,
      fmt::format("--ranks-per-worker={}", count),
      fmt::format("--leader-timeout={}", flags.leader_timeout_s),
      fmt::format("--threads={}", std::max(1, threads / count)),
      "--device=" + flags.worker.device.kind,
      fmt::format("--exit-with-parent={}", getpid()),
  };
  const auto add = [&common](const char* name, const std::string& value) {
    if (!value.empty()) common.push_back(name + value);
  };
  add("--model=", flags.worker.model_dir);
  add("--tuning-file=", flags.worker.device.tuning_file);
  add("--trace=", flags.worker.trace_file);
  add("--comm-address=", flags.comm.hostname_or_address);
  add("--comm-interface=", flags.comm.interface);
  add("--comm-ports=", flags.comm_ports);
  common.push_back("--cpu-gemm=" + flags.worker.device.cpu_gemm);
  if (flags.worker.device.deterministic) common.emplace_back("--deterministic");
  if (flags.rank.has_value()) return InvalidArgument("--rank names one rank, --ranks-per-worker {} of them", count);
  ASSIGN_OR_RETURN(const auto children, LocalWorkers::Start(count, [common](int index) {
                     std::vector<std::string> arguments = common;
                     arguments.push_back(fmt::format("--local-index={}", index));
                     return arguments;
                   }));
  std::signal(SIGTERM, OnParentSignal);
  std::signal(SIGINT, OnParentSignal);
  return children->Wait([] { return stop_requested.load(); });
}

int RunWorker(WorkerFlags flags) {
  if (flags.parent > 0) ExitWithParent(flags.parent);
  absl::Status status = Complete(flags);
  status.Update(ParseDevice(flags));
  status.Update(ParsePorts(flags));
  if (!status.ok() || flags.check_flags) return Report(status);
  if (flags.ranks_per_worker > 1 && !flags.local_index.has_value()) {
    const absl::StatusOr<int> result = RunChildren(flags);
    return result.ok() ? *result : Report(result.status());
  }
  std::signal(SIGTERM, OnSignal);
  std::signal(SIGINT, OnSignal);
  flags.worker.version = kVersion;
  flags.worker.leader_timeout = absl::Seconds(flags.leader_timeout_s);
  flags.worker.make_comm = MakeCommFactory(flags.worker.device.kind, flags.comm);
  status = RunWorkerProcess(flags.worker);
  Report(status);
  return status.ok() ? 0 : absl::IsUnavailable(status) ? LocalWorkers::kLeaderLostStatus : 1;
}

}  // namespace

void AddWorker(CLI::App& app, int& exit_code) {
  auto flags = std::make_shared<WorkerFlags>();
  CLI::App* sub = app.add_subcommand("worker", "one rank of a cluster: dials `soloist serve --workers=N`");
  sub->add_option("--leader", flags->worker.leader,
                  "HOST:PORT of the leader; default: LWS_LEADER_ADDRESS:--leader-port");
  sub->add_option("--leader-port", flags->leader_port, "with LWS_LEADER_ADDRESS")->capture_default_str();
  sub->add_option("--rank", flags->rank,
                  "default: LWS_WORKER_INDEX * --ranks-per-worker + --local-index, else any that is free")
      ->check(CLI::Range(-1, 1 << 20));
  sub->add_option("--ranks-per-worker", flags->ranks_per_worker,
                  "ranks of this host (or pod); without --local-index this process starts one child for each")
      ->check(CLI::PositiveNumber)
      ->capture_default_str();
  sub->add_option("--local-index", flags->local_index, "which of this host's ranks")->check(CLI::NonNegativeNumber);
  sub->add_option("--device", flags->device, "cpu, cuda or cuda:N; cuda alone: the GPU of the local index")
      ->capture_default_str();
  sub->add_option("--model", flags->worker.model_dir, "model folder on this host; default: the leader's path");
  sub->add_option("--threads", flags->worker.device.cpu_threads, "CPU threads; 0: one per core")->capture_default_str();
  AddCpuGemm(*sub, flags->worker.device.cpu_gemm, "as the leader");
  sub->add_flag("--deterministic", flags->worker.device.deterministic, "as the leader");
  sub->add_option("--tuning-file", flags->worker.device.tuning_file, "CUDA: see serve");
  sub->add_option("--trace", flags->worker.trace_file, "writes what the rank does to this file with .rankR behind it");
  sub->add_option("--leader-timeout", flags->leader_timeout_s,
                  "seconds without a leader, dialling again and again, before this ends with status 3")
      ->check(CLI::PositiveNumber)
      ->capture_default_str();
  sub->add_option("--comm-address", flags->comm.hostname_or_address,
                  "CPU: what other ranks dial; default: of --comm-interface");
  sub->add_option("--comm-interface", flags->comm.interface, "CPU: default: the first that is up and no loopback");
  sub->add_option("--comm-ports", flags->comm_ports, "CPU: FIRST-LAST to listen at for other ranks; default: any");
  sub->add_option("--exit-with-parent", flags->parent, "pid of the parent, with whose end this one ends");
  AddCheckFlags(*sub, flags->check_flags);
  sub->callback([flags, &exit_code] { exit_code = RunWorker(*flags); });
}

}  // namespace soloist::cli
