#include "engine/worker/in_process_engine.h"

#include <algorithm>
#include <chrono>
#include <condition_variable>
#include <filesystem>
#include <mutex>
#include <thread>
#include <utility>

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

absl::Status CheckOptions(const EngineOptions& options, const ModelConfig& config) {
  const auto positive = [](const char* name, int64_t value) {
    return value >= 1 ? absl::OkStatus() : InvalidArgument("{} is {}, allowed: >= 1", name, value);
  };
  RETURN_IF_ERROR(positive("block_size", options.block_size));
  RETURN_IF_ERROR(positive("max_tokens_per_step", options.max_tokens_per_step));
  RETURN_IF_ERROR(positive("max_sequences", options.max_sequences));
  if (options.max_tokens_per_step < options.max_sequences) {
    return InvalidArgument("max_tokens_per_step is {}, less than max_sequences {}: decodes alone would not fit",
                           options.max_tokens_per_step, options.max_sequences);
  }
  if (options.max_model_len < 0 || options.max_model_len > config.max_position_embeddings) {
    return InvalidArgument("max_model_len is {}, allowed: 1 to the model's {} positions (0: all)",
                           options.max_model_len, config.max_position_embeddings);
  }
  if (!(options.memory_fraction > 0 && options.memory_fraction <= 1)) {
    return InvalidArgument("memory_fraction is {}, allowed: (0, 1]", options.memory_fraction);
  }
  const bool cuda = options.device.kind == "cuda";
  if (options.kv_dtype != "bf16" && options.kv_dtype != (cuda ? "fp8_e4m3" : "f32")) {
    return InvalidArgument("kv_dtype is '{}', allowed on {}: {}, bf16", options.kv_dtype, options.device.kind,
                           cuda ? "fp8_e4m3" : "f32");
  }
  if (options.slice_ranks < 0 || (options.slice_ranks > 0 && options.num_ranks != 1)) {
    return InvalidArgument("slice of {} ranks with {} ranks: a slice is one rank", options.slice_ranks,
                           options.num_ranks);
  }
  if (options.slice_ranks > 0 && config.num_experts % options.slice_ranks != 0) {
    return InvalidArgument("slice of {} ranks: {} experts do not divide evenly", options.slice_ranks,
                           config.num_experts);
  }
  if (cuda && options.num_ranks > 1) {
    return InvalidArgument("{} ranks on cuda: one process drives one GPU; allowed: 1", options.num_ranks);
  }
  if (options.load_format != "auto" && options.load_format != "dummy") {
    return InvalidArgument("load_format is '{}', allowed: auto, dummy", options.load_format);
  }
  return absl::OkStatus();
}

// KV blocks per home: the flag, or what memory and use allow. `free_bytes`: for each home.
absl::StatusOr<int32_t> ChooseBlocks(const EngineOptions& options, const ModelConfig& config, DType kv_dtype,
                                     int32_t max_model_len, int64_t free_bytes) {
  const int64_t per_sequence = (max_model_len + options.block_size - 1) / options.block_size;
  const int64_t block_bytes = KvBytesPerToken(config, kv_dtype) * options.block_size;
  if (options.num_blocks > 0) return options.num_blocks;
  if (options.num_blocks < 0) return InvalidArgument("num_blocks is {}, allowed: >= 0", options.num_blocks);
  const int64_t fit = static_cast<int64_t>(options.memory_fraction * static_cast<double>(free_bytes)) / block_bytes;
  if (fit < 1) {
    return ResourceExhausted("no memory for KV: one block is {} bytes, a rank may take {} of {} free bytes",
                             block_bytes, options.memory_fraction, free_bytes);
  }
  return static_cast<int32_t>(
      std::min<int64_t>({fit, per_sequence * options.max_sequences, INT32_MAX / options.block_size}));
}

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

EngineOptions WithDefaults(EngineOptions options) {
  const bool cuda = options.device.kind == "cuda";
  if (options.block_size == 0) options.block_size = cuda ? 64 : 16;
  if (options.max_tokens_per_step == 0) options.max_tokens_per_step = cuda ? 8192 : 512;
  if (options.memory_fraction == 0) options.memory_fraction = cuda ? 0.9 : 0.5;
  if (options.kv_dtype == "auto") options.kv_dtype = cuda ? "bf16" : "f32";
  return options;
}

absl::StatusOr<std::unique_ptr<Engine>> CreateInProcessEngine(const EngineOptions& given, const Clock& clock,
                                                              const LoadCallback& on_progress) {
  const EngineOptions options = WithDefaults(given);
  ASSIGN_OR_RETURN(const ModelConfig config, LoadModelConfig(options.model_dir));
  RETURN_IF_ERROR(CheckOptions(options, config));
  const int ranks = options.num_ranks;
  const int groups = options.slice_ranks > 0 ? options.slice_ranks : ranks;  // ranks that share the experts
  auto placement = options.expert_rank.empty()
                       ? ExpertPlacement::Contiguous(static_cast<int>(config.num_experts), groups)
                       : ExpertPlacement::FromMap(options.expert_rank, groups);
  RETURN_IF_ERROR(placement.status());
  RETURN_IF_ERROR(ParallelPlan::Solo(ranks, ranks).Validate());
  const DType kv_dtype = options.kv_dtype == "bf16"  ? DType::kBF16
                         : options.kv_dtype == "f32" ? DType::kF32
                                                     : DType::kF8E4M3;
  const int32_t max_model_len =
      options.max_model_len > 0 ? options.max_model_len : static_cast<int32_t>(config.max_position_embeddings);
  const int threads = options.device.cpu_threads > 0
                          ? options.device.cpu_threads
                          : std::max(1, static_cast<int>(std::thread::hardware_concurrency()));

  ASSIGN_OR_RETURN(auto factory, CreateDeviceFactory(options.device));
  std::unique_ptr<const WeightSource> source;
  if (options.load_format == "dummy") {
    ASSIGN_OR_RETURN(source, CreateDummySource(config, options.dummy_seed));
  } else {
    ASSIGN_OR_RETURN(source, OpenCheckpointSource(config, options.model_dir));
  }

  std::vector<std::unique_ptr<Device>> devices(ranks);
  for (int r = 0; r < ranks; ++r) {
    ASSIGN_OR_RETURN(devices[r], factory->CreateDevice(r));
  }
  LoadProgress progress;
  int64_t local_experts = 0;
  for (int r = 0; r < ranks; ++r) local_experts += std::ssize(placement->ExpertsOf(r));
  const int64_t total = SharedWeightBytes(config) + ExpertWeightBytes(config, local_experts);
  auto shared = std::make_unique<SharedWeights>();
  std::vector<ExpertWeights> experts(ranks);
  RETURN_IF_ERROR(LoadWithProgress(
      [&]() -> absl::Status {
        ASSIGN_OR_RETURN(*shared, LoadSharedWeights(config, *source, max_model_len, *devices[0], threads, progress));
        for (int r = 0; r < ranks; ++r) {
          ASSIGN_OR_RETURN(experts[r],
                           LoadExpertWeights(config, *source, placement->ExpertsOf(r), *devices[r], threads, progress));
        }
        return absl::OkStatus();
      },
      progress, total, on_progress));

  EngineInfo info;
  info.model_name = std::filesystem::path(options.model_dir).lexically_normal().filename().string();
  if (info.model_name.empty()) {
    info.model_name = std::filesystem::path(options.model_dir).lexically_normal().parent_path().filename().string();
  }
  info.architecture = config.architecture;
  info.device = devices[0]->Name();
  info.num_ranks = info.num_homes = ranks;
  info.num_layers = static_cast<int>(config.num_layers);
  info.num_experts = static_cast<int>(config.num_experts);
  info.experts_per_token = static_cast<int>(config.experts_per_token);
  info.kv_bytes_per_token = KvBytesPerToken(config, kv_dtype);
  info.weight_bytes_per_rank = shared->bytes() + experts[0].bytes();
  info.expert_rank = options.slice_ranks > 0 ? std::vector<int>(config.num_experts, 0) : placement->expert_rank();
  info.limits = {.vocab_size = static_cast<int32_t>(config.vocab_size),
                 .max_model_len = max_model_len,
                 .num_blocks = 0,
                 .block_size = options.block_size,
                 .max_tokens = options.max_tokens_per_step,
                 .max_sequences = options.max_sequences};

  std::vector<std::unique_ptr<Communicator>> comms;
  if (ranks == 1) {
    comms.push_back(CreateSelfCommunicator(*devices[0]));
  } else {
    ASSIGN_OR_RETURN(comms,
                     CreateSharedMemoryCommunicators(ranks, *devices[0], {.timeout = options.collective_timeout}));
  }
  WorkerOptions worker_options = {.limits = info.limits,
                                  .kv_dtype = kv_dtype,
                                  .masked_max_tokens = options.masked_max_tokens,
                                  .expert_rank = placement->expert_rank(),
                                  .loopback_ranks = options.slice_ranks,
                                  .profile_every = options.profile_every};
  if (options.slice_uniform) worker_options.loopback_experts = RoundRobinExperts(info.limits.max_tokens, config);
  std::vector<std::unique_ptr<Worker>> workers(ranks);
  int64_t free_bytes = INT64_MAX;
  for (int r = 0; r < ranks; ++r) {
    ASSIGN_OR_RETURN(workers[r], Worker::Create(config, worker_options, *shared, std::move(experts[r]),
                                                std::move(devices[r]), std::move(comms[r])));
    const Device& device = workers[r]->device();
    free_bytes = std::min(free_bytes, device.FreeBytes() / (device.host_accessible() ? ranks : 1));
  }
  ASSIGN_OR_RETURN(info.limits.num_blocks, ChooseBlocks(options, config, kv_dtype, max_model_len, free_bytes));
  for (auto& worker : workers) {
    RETURN_IF_ERROR(worker->AllocateKv(info.limits.num_blocks));
    RETURN_IF_ERROR(worker->WarmUp([](int done, int all) {
      if (done == all) spdlog::info("captured {} decode graphs", all);
    }));
  }
  return CreateRankThreads(std::move(info), std::move(factory), std::move(shared), std::move(workers), clock);
}

}  // namespace soloist
