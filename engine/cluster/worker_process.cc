#include "engine/cluster/worker_process.h"

#include <unistd.h>

#include <thread>
#include <utility>

#include "base/clock.h"
#include "base/status.h"
#include "engine/cluster/fingerprint.h"
#include "engine/cluster/host_facts.h"
#include "engine/cluster/wire.h"
#include "engine/cluster/worker_session.h"
#include "spdlog/spdlog.h"

namespace soloist {
namespace {

// Between two attempts to reach the leader.
constexpr absl::Duration kRedialAfter = absl::Milliseconds(200);

absl::StatusOr<worker::v1::Hello> MakeHello(const WorkerProcessOptions& options) {
  const HostFacts facts = DescribeHost(options.device.kind == "cuda" ? options.device_index : -1);
  worker::v1::Hello hello;
  hello.set_schema_revision(kWorkerSchemaRevision);
  hello.set_version(options.version);
  ASSIGN_OR_RETURN(*hello.mutable_build_id(), ExecutableFingerprint());
  hello.set_host(facts.name);
  hello.set_pid(getpid());
  hello.set_device_kind(options.device.kind);
  hello.set_deterministic(options.device.deterministic);
  hello.set_cpu_gemm(options.device.cpu_gemm);
  hello.set_pci_address(facts.pci_address);
  hello.set_numa_node(facts.numa_node);
  for (const std::string& name : facts.network_interfaces) hello.add_network_interfaces(name);
  hello.set_wanted_rank(options.rank);
  hello.set_group_size(options.group_size);
  return hello;
}

}  // namespace

absl::Status RunWorkerProcess(const WorkerProcessOptions& options) {
  ASSIGN_OR_RETURN(worker::v1::Hello hello, MakeHello(options));
  ASSIGN_OR_RETURN(const auto factory, CreateDeviceFactory(options.device));
  const Clock& clock = Clock::Real();
  int64_t last_contact_ns = clock.NowNs();
  for (;;) {
    ASSIGN_OR_RETURN(auto device, factory->CreateDevice(options.device_index));
    hello.set_device_name(device->Name());
    hello.set_free_bytes(device->FreeBytes());
    hello.set_host_memory(device->host_accessible());
    WorkerSession session(options, hello, std::move(device));
    const WorkerSession::Outcome outcome = session.Run();
    if (!outcome.leader_lost) return outcome.status;
    const int64_t now_ns = clock.NowNs();
    if (outcome.connected) {
      last_contact_ns = now_ns;
      spdlog::warn("worker: {}; dialling again for {}", outcome.status.message(),
                   absl::FormatDuration(options.leader_timeout));
    }
    if (now_ns - last_contact_ns > absl::ToInt64Nanoseconds(options.leader_timeout)) {
      return Unavailable("no leader at {} for {}: {}", options.leader, absl::FormatDuration(options.leader_timeout),
                         outcome.status.message());
    }
    std::this_thread::sleep_for(absl::ToChronoNanoseconds(kRedialAfter));
  }
}

}  // namespace soloist
