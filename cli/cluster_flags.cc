#include "cli/cluster_flags.h"

#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cstdio>
#include <utility>
#include <vector>

#include "base/clock.h"
#include "base/host_limits.h"
#include "base/status.h"
#include "engine/replay.h"
#include "server/version.h"
#include "spdlog/spdlog.h"

namespace soloist::cli {
namespace {

constexpr char kDefaultAddress[] = "127.0.0.1:50052";

// One line, rewritten, or one per rank: "loading  12.3 of 23.4 MB  [#####.....]  1.20 GB/s".
class ProgressBars {
 public:
  void Show(int64_t loaded, int64_t total) { Show({RankProgress{.loaded_bytes = loaded, .total_bytes = total}}); }
  void Show(const std::vector<RankProgress>& ranks) {
    int64_t loaded = 0, total = 0;
    for (const RankProgress& rank : ranks) {
      loaded += rank.loaded_bytes;
      total += rank.total_bytes;
    }
    const bool all = std::ranges::all_of(
        ranks, [](const RankProgress& r) { return r.total_bytes > 0 && r.loaded_bytes == r.total_bytes; });
    const double seconds = static_cast<double>(Clock::Real().NowNs() - start_ns_) * 1e-9;
    if (!done_ && isatty(STDERR_FILENO) != 0) {
      Draw(ranks, seconds);
    } else if (!done_ && all) {
      spdlog::info("loaded {:.1f} MB of weights in {:.2f} s ({:.2f} GB/s)", static_cast<double>(total) * 1e-6, seconds,
                   seconds > 0 ? static_cast<double>(loaded) / seconds * 1e-9 : 0);
    }
    done_ = done_ || all;
  }

 private:
  void Draw(const std::vector<RankProgress>& ranks, double seconds) {
    if (lines_ > 1) fmt::print(stderr, "\x1b[{}A", lines_ - 1);
    for (size_t r = 0; r < ranks.size(); ++r) {
      const RankProgress& rank = ranks[r];
      const double share =
          rank.total_bytes > 0 ? static_cast<double>(rank.loaded_bytes) / static_cast<double>(rank.total_bytes) : 0;
      std::string bar(static_cast<size_t>(share * 30), '#');
      bar.resize(30, '.');
      const double rate = seconds > 0 ? static_cast<double>(rank.loaded_bytes) / seconds * 1e-9 : 0;
      const std::string name = ranks.size() > 1 ? fmt::format("rank {:>3}  ", rank.rank) : "";
      fmt::print(stderr, "\r{}loading  {:.1f} of {:.1f} MB  [{}]  {:.2f} GB/s \x1b[K{}", name,
                 static_cast<double>(rank.loaded_bytes) * 1e-6, static_cast<double>(rank.total_bytes) * 1e-6, bar, rate,
                 r + 1 < ranks.size() || share == 1 ? "\n" : "");
    }
    std::fflush(stderr);
    lines_ = ranks.size();
  }

  const int64_t start_ns_ = Clock::Real().NowNs();
  size_t lines_ = 0;
  bool done_ = false;
};

std::string HostName() {
  char name[256] = {};
  return gethostname(name, sizeof(name) - 1) == 0 ? name : "";
}

// What a worker that is a child of this process is started with.
std::vector<std::string> WorkerArguments(const EngineOptions& engine, const std::string& leader, int index, int count) {
  const int threads = engine.device.cpu_threads > 0 ? engine.device.cpu_threads : UsableCores();
  const bool cuda = engine.device.kind == "cuda";
  std::vector<std::string> arguments = {
      "worker",
      "--leader=" + leader,
      cuda ? fmt::format("--device=cuda:{}", index) : "--device=cpu",
      fmt::format("--threads={}", std::max(1, threads / count)),
      "--cpu-gemm=" + engine.device.cpu_gemm,
      "--comm-address=127.0.0.1",
      fmt::format("--exit-with-parent={}", getpid()),
      spdlog::should_log(spdlog::level::debug) ? "--log-level=debug" : "--log-level=warn",
  };
  if (engine.device.deterministic) arguments.emplace_back("--deterministic");
  if (!engine.trace_file.empty()) arguments.push_back("--trace=" + engine.trace_file);
  if (!engine.device.tuning_file.empty()) arguments.push_back("--tuning-file=" + engine.device.tuning_file);
  return arguments;
}

// `room` says nothing yet of the layouts.
std::unique_ptr<Engine> WithDispatchRoom(std::unique_ptr<Engine> ranks, DispatchRoomOptions room) {
  room.masked_max_tokens = ranks->Info().masked_max_tokens;
  return std::make_unique<ReplayEngine>(std::move(ranks), room);
}

}  // namespace

void ClusterFlags::AddTo(CLI::App& app) {
  app.add_option("--engine", engine, "in-process: ranks are threads; cluster: each is a `soloist worker` process")
      ->check(CLI::IsMember({"in-process", "cluster"}));
  app.add_option("--workers", workers,
                 "cluster: number of workers, 1 to the number of experts; implies --engine=cluster")
      ->check(CLI::NonNegativeNumber);
  app.add_option("--spawn", spawn, "local: starts the workers as children, and replaces those that die")
      ->check(CLI::IsMember({"local"}));
  app.add_option("--cluster-address", address,
                 std::string("HOST:PORT to listen at for workers; default ") + kDefaultAddress +
                     ", with --spawn any free port of 127.0.0.1");
  app.add_option("--spares", spares, "workers beyond --workers that wait for one to be lost")
      ->check(CLI::NonNegativeNumber)
      ->capture_default_str();
  app.add_option("--dispatch-capacity", dispatch_capacity,
                 "rows of one expert that a rank may send in a step of --masked-max-tokens or fewer: a number, worst "
                 "(all), or auto (what steps want); a step that wants more is run again")
      ->capture_default_str();
  app.add_option("--require-transport", require_transport, "refuse a slower transport between ranks: any, ib, nvlink")
      ->check(CLI::IsMember({"any", "ib", "nvlink"}))
      ->capture_default_str();
  app.add_option("--start-timeout", start_timeout_s, "seconds until all workers must be ready")
      ->check(CLI::PositiveNumber)
      ->capture_default_str();
  app.add_option("--silence-timeout", silence_timeout_s, "seconds of silence after which a worker is lost")
      ->check(CLI::PositiveNumber)
      ->capture_default_str();
  app.add_option("--step-timeout", step_timeout_s,
                 "seconds after the first rank's result of a step, after which those without one are lost")
      ->check(CLI::PositiveNumber)
      ->capture_default_str();
  app.add_option(
         "--on-loss", on_loss,
         "wait: requests wait until a worker takes the place of one that is lost; shrink: for --replace-timeout, "
         "then the others load its experts, beside their own if there is memory, and go on without it")
      ->check(CLI::IsMember({"wait", "shrink"}))
      ->capture_default_str();
  app.add_option("--replace-timeout", replace_timeout_s,
                 "seconds that --on-loss=shrink waits for a worker in the place of one that is lost; less: a shorter "
                 "pause, more: fewer loads of experts that are handed back soon")
      ->check(CLI::PositiveNumber)
      ->capture_default_str();
}

absl::StatusOr<bool> ClusterFlags::IsCluster() const {
  const bool wanted = engine == "cluster" || (engine.empty() && workers > 0);
  if (wanted && workers < 1) return InvalidArgument("--engine=cluster needs --workers=N");
  if (!wanted && (workers > 0 || !spawn.empty() || spares > 0 || on_loss != "wait")) {
    return InvalidArgument("--workers, --spawn, --spares and --on-loss belong to --engine=cluster");
  }
  return wanted;
}

absl::StatusOr<StartedEngine> StartEngine(const EngineOptions& engine, const ClusterFlags& cluster) {
  StartedEngine started;
  ProgressBars bars;
  ASSIGN_OR_RETURN(const bool is_cluster, cluster.IsCluster());
  ASSIGN_OR_RETURN(const DispatchRoomOptions room, ParseDispatchRoom(cluster.dispatch_capacity));
  if (!is_cluster) {
    ASSIGN_OR_RETURN(auto ranks, CreateInProcessEngine(engine, Clock::Real(), [&](int64_t loaded, int64_t total) {
                       bars.Show(loaded, total);
                     }));
    started.engine = WithDispatchRoom(std::move(ranks), room);
    return started;
  }
  const bool local = cluster.spawn == "local";
  ClusterOptions options{.engine = engine,
                         .address = cluster.address,
                         .version = kVersion,
                         .spares = cluster.spares,
                         .require_transport = cluster.require_transport,
                         .start_timeout = absl::Seconds(cluster.start_timeout_s),
                         .silence_timeout = absl::Seconds(cluster.silence_timeout_s),
                         .step_timeout = absl::Seconds(cluster.step_timeout_s),
                         .on_loss = cluster.on_loss == "shrink" ? OnLoss::kShrink : OnLoss::kWait,
                         .replace_timeout = absl::Seconds(cluster.replace_timeout_s)};
  options.engine.num_ranks = cluster.workers;
  if (options.address.empty()) options.address = local ? "127.0.0.1:0" : kDefaultAddress;
  // Workers may be lost from the moment on at which they are started.
  const auto children = std::make_shared<std::atomic<LocalWorkers*>>(nullptr);
  options.on_listening = [&](const std::string& address) -> absl::Status {
    spdlog::info("waiting for {} workers at {}", cluster.workers, address);
    if (!local) return absl::OkStatus();
    const int count = cluster.workers + cluster.spares;
    ASSIGN_OR_RETURN(started.workers, LocalWorkers::Start(count, [engine, address, count](int index) {
                       return WorkerArguments(engine, address, index, count);
                     }));
    children->store(started.workers.get());
    return absl::OkStatus();
  };
  options.on_lost = [children, host = HostName()](const std::string& lost_host, int64_t pid) {
    LocalWorkers* const workers = children->load();
    if (workers != nullptr && lost_host == host) workers->Kill(pid);
  };
  ASSIGN_OR_RETURN(auto made, CreateClusterEngine(options, Clock::Real(),
                                                  [&](const std::vector<RankProgress>& ranks) { bars.Show(ranks); }));
  started.cluster = made.get();
  started.engine = WithDispatchRoom(std::move(made), room);
  return started;
}

}  // namespace soloist::cli
