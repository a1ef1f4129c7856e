#include "engine/worker/in_process_engine.h"

#include <algorithm>
#include <chrono>
#include <condition_variable>
#include <mutex>
#include <thread>
#include <utility>

#include "base/host_limits.h"
#include "base/status.h"
#include "engine/comm/communicator.h"
#include "engine/model/device_weights.h"
#include "engine/model/footprint.h"
#include "engine/model/weights.h"
#include "engine/placement/parallel_plan.h"
#include "engine/worker/rank_threads.h"
#include "engine/worker/worker.h"
#include "spdlog/spdlog.h"

namespace soloist {
namespace {

// Rows to the experts in turn: row i's j-th choice is expert (i * top_k + j) mod num_experts.
std::vector<int32_t> RoundRobinExperts(int64_t rows, const ModelConfig& config) {
  std::vector<int32_t> experts(rows * config.experts_per_token);
  for (size_t i = 0; i < experts.size(); ++i) experts[i] = static_cast<int32_t>(i % config.num_experts);
  return experts;
}

// Runs `load` on a thread of its own and calls on_progress from here until it is done.
absl::Status LoadWithProgress(const std::function<absl::Status()>& load, const LoadProgress& progress, int64_t total,
                              const LoadCallback& on_progress) {
  absl::Status status;
  std::mutex mutex;
  std::condition_variable finished;
  bool done = false;
  std::thread thread([&] {
    absl::Status loaded = load();
    std::lock_guard lock(mutex);
    status = std::move(loaded);
    done = true;
    finished.notify_all();
  });
  {
    std::unique_lock lock(mutex);
    while (!finished.wait_for(lock, std::chrono::milliseconds(100), [&] { return done; })) {
      if (on_progress) on_progress(progress.loaded_bytes, total);
    }
  }
  thread.join();
  if (status.ok() && on_progress) on_progress(total, total);
  return status;
}

}  // namespace

absl::StatusOr<std::unique_ptr<Engine>> CreateInProcessEngine(const EngineOptions& given, const Clock& clock,
                                                              const LoadCallback& on_progress) {
  const EngineOptions options = WithDefaults(given);
  ASSIGN_OR_RETURN(const ModelConfig config, LoadModelConfig(options.model_dir));
  RETURN_IF_ERROR(CheckEngineOptions(options, config));
  const int ranks = options.num_ranks;
  if (options.device.kind == "cuda" && ranks > 1) {
    return InvalidArgument("{} ranks on cuda: one process drives one GPU; allowed: 1", ranks);
  }
  ASSIGN_OR_RETURN(const ExpertPlacement placement,
                   PlaceExperts(options, config, options.slice_ranks > 0 ? options.slice_ranks : ranks));
  RETURN_IF_ERROR(ParallelPlan::Solo(ranks, ranks).Validate());
  EngineInfo info = DescribeEngine(options, config, placement);
  const int threads = options.device.cpu_threads > 0 ? options.device.cpu_threads : UsableCores();

  ASSIGN_OR_RETURN(auto factory, CreateDeviceFactory(options.device));
  ASSIGN_OR_RETURN(const auto source, OpenWeights(config, options.model_dir, options.load_format, options.dummy_seed));

  std::vector<std::unique_ptr<Device>> devices(ranks);
  for (int r = 0; r < ranks; ++r) {
    ASSIGN_OR_RETURN(devices[r], factory->CreateDevice(r));
  }
  LoadProgress progress;
  int64_t local_experts = 0;
  for (int r = 0; r < ranks; ++r) local_experts += std::ssize(placement.ExpertsOf(r));
  const int64_t total = SharedWeightBytes(config) + ExpertWeightBytes(config, local_experts);
  auto shared = std::make_unique<SharedWeights>();
  std::vector<ExpertWeights> experts(ranks);
  RETURN_IF_ERROR(LoadWithProgress(
      [&]() -> absl::Status {
        ASSIGN_OR_RETURN(*shared,
                         LoadSharedWeights(config, *source, info.limits.max_model_len, *devices[0], threads, progress));
        for (int r = 0; r < ranks; ++r) {
          ASSIGN_OR_RETURN(experts[r],
                           LoadExpertWeights(config, *source, placement.ExpertsOf(r), *devices[r], threads, progress));
        }
        return absl::OkStatus();
      },
      progress, total, on_progress));

  info.device = devices[0]->Name();
  info.weight_bytes_per_rank = shared->bytes() + experts[0].bytes();

  std::vector<std::unique_ptr<Communicator>> comms;
  if (ranks == 1) {
    comms.push_back(CreateSelfCommunicator(*devices[0]));
  } else {
    ASSIGN_OR_RETURN(comms,
                     CreateSharedMemoryCommunicators(ranks, *devices[0], {.timeout = options.collective_timeout}));
  }
  WorkerOptions worker_options = {.limits = info.limits,
                                  .kv_dtype = KvDType(options.kv_dtype),
                                  .masked_max_tokens = info.masked_max_tokens,
                                  .expert_rank = placement.expert_rank(),
                                  .loopback_ranks = options.slice_ranks,
                                  .profile_every = options.profile_every};
  if (options.slice_uniform) worker_options.loopback_experts = RoundRobinExperts(info.limits.max_tokens, config);
  if (!options.trace_file.empty()) {
    ASSIGN_OR_RETURN(worker_options.trace, TraceWriter::Open(options.trace_file));
  }
  std::vector<std::unique_ptr<Worker>> workers(ranks);
  int64_t free_bytes = INT64_MAX;
  for (int r = 0; r < ranks; ++r) {
    ASSIGN_OR_RETURN(workers[r], Worker::Create(config, worker_options, *shared, std::move(experts[r]),
                                                std::move(devices[r]), std::move(comms[r])));
    const Device& device = workers[r]->device();
    free_bytes = std::min(free_bytes, device.FreeBytes() / (device.host_accessible() ? ranks : 1));
  }
  ASSIGN_OR_RETURN(info.limits.num_blocks, ChooseBlocks(options, info, free_bytes));
  for (auto& worker : workers) {
    RETURN_IF_ERROR(worker->AllocateKv(info.limits.num_blocks));
    RETURN_IF_ERROR(worker->WarmUp([](int done, int all) {
      if (done == all) spdlog::info("captured {} decode graphs", all);
    }));
  }
  return CreateRankThreads(std::move(info), std::move(factory), std::move(shared), std::move(workers), clock);
}

}  // namespace soloist
