#include "engine/worker/in_process_engine.h"

#include <algorithm>
#include <chrono>
#include <condition_variable>
#include <deque>
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
#include "engine/worker/worker.h"
#include "spdlog/spdlog.h"

namespace soloist {
namespace {

// A step on its way: every rank fills its own home; the last one to finish makes it ready.
struct PendingStep {
  StepPlan plan;
  StepResult result;
  int ranks_left = 0;
};

class InProcessEngine final : public Engine {
 public:
  InProcessEngine(EngineInfo info, std::unique_ptr<DeviceFactory> factory, std::unique_ptr<SharedWeights> shared,
                  std::vector<std::unique_ptr<Worker>> workers, const Clock& clock)
      : info_(std::move(info)),
        clock_(clock),
        factory_(std::move(factory)),
        shared_(std::move(shared)),
        workers_(std::move(workers)),
        ranks_(workers_.size()) {
    for (int r = 0; r < info_.num_ranks; ++r) {
      ranks_[r] = {.rank = r, .state = RankState::kReady, .message = ""};
      threads_.emplace_back([this, r] { RunRank(r); });
    }
  }

  ~InProcessEngine() override {
    {
      std::lock_guard lock(mutex_);
      stopping_ = true;
    }
    changed_.notify_all();
    for (auto& worker : workers_) worker->comm().Abort(absl::CancelledError("the engine is stopping"));
    for (std::thread& thread : threads_) thread.join();
  }

  const EngineInfo& Info() const override { return info_; }

  absl::Status Submit(StepPlan plan) override {
    if (static_cast<int>(plan.homes.size()) != info_.num_homes) {
      return InvalidArgument("plan: {} homes, the engine has {}", plan.homes.size(), info_.num_homes);
    }
    int32_t largest = 0;
    for (const HomePlan& home : plan.homes) {
      RETURN_IF_ERROR(home.Validate(info_.limits));
      largest = std::max(largest, home.num_tokens());
    }
    for (int h = 0; h < info_.num_homes; ++h) {
      const HomePlan& home = plan.homes[h];
      if (home.max_home_tokens() != largest || home.step() != plan.step) {
        return InvalidArgument("plan: home {} says step {} and {} tokens on the busiest home, expected {} and {}", h,
                               home.step(), home.max_home_tokens(), plan.step, largest);
      }
    }
    std::unique_lock lock(mutex_);
    if (!error_.ok()) return error_;
    if (plan.step != last_submitted_ + 1) {
      return InvalidArgument("plan: step {} after step {}", plan.step, last_submitted_);
    }
    if (pending_.size() >= kMaxInFlight) {
      return FailedPrecondition("{} steps are in flight, limit {}", pending_.size(), kMaxInFlight);
    }
    for (int h = 0; h < info_.num_homes; ++h) {
      if (plan.homes[h].previous_rows() > previous_rows_[h]) {
        return InvalidArgument("plan: home {} refers to {} rows of the previous step, which had {}", h,
                               plan.homes[h].previous_rows(), previous_rows_[h]);
      }
    }
    for (int h = 0; h < info_.num_homes; ++h) previous_rows_[h] = plan.homes[h].num_logit_rows();
    last_submitted_ = plan.step;
    auto step = std::make_unique<PendingStep>();
    step->result.step = plan.step;
    step->result.homes.resize(info_.num_homes);
    step->ranks_left = info_.num_ranks;
    step->plan = std::move(plan);
    pending_.push_back(std::move(step));
    lock.unlock();
    changed_.notify_all();
    return absl::OkStatus();
  }

  absl::StatusOr<StepResult> Await() override {
    std::unique_lock lock(mutex_);
    if (pending_.empty() && error_.ok()) return absl::FailedPreconditionError("no step is in flight");
    done_.wait(lock, [this] { return !error_.ok() || pending_.front()->ranks_left == 0; });
    if (!error_.ok()) return error_;
    StepResult result = std::move(pending_.front()->result);
    pending_.pop_front();
    return result;
  }

  std::vector<RankStatus> Ranks() const override {
    std::lock_guard lock(mutex_);
    return ranks_;
  }

 private:
  void RunRank(int rank) {
    for (int64_t next = 1;; ++next) {
      PendingStep* step = nullptr;
      int64_t started = 0;
      {
        std::unique_lock lock(mutex_);
        changed_.wait(lock, [&] { return stopping_ || !error_.ok() || last_submitted_ >= next; });
        if (stopping_ || !error_.ok()) return;
        step = pending_[next - pending_.front()->plan.step].get();
        started = ranks_[rank].busy_since_ns = clock_.NowNs();
      }
      auto result = workers_[rank]->Execute(step->plan.homes[rank]);
      const int64_t now = clock_.NowNs();
      std::unique_lock lock(mutex_);
      ranks_[rank].busy_since_ns = 0;
      if (!result.ok()) {
        ranks_[rank].state = RankState::kFailed;
        ranks_[rank].message = result.status().ToString();
        if (error_.ok() && !stopping_) {
          error_ = Annotate(result.status(), fmt::format("rank {}, step {}", rank, next));
          spdlog::error("engine: {}", error_.ToString());
        }
        lock.unlock();
        workers_[rank]->comm().Abort(result.status());
        changed_.notify_all();
        done_.notify_all();
        return;
      }
      ranks_[rank].last_step = next;
      ranks_[rank].last_step_ns = now;
      step->result.homes[rank] = *std::move(result);
      step->result.device_ns = std::max(step->result.device_ns, now - started);
      const bool last = --step->ranks_left == 0;
      lock.unlock();
      if (last) done_.notify_all();
    }
  }

  const EngineInfo info_;
  const Clock& clock_;
  // Order of destruction: workers use the weights, both use the factory's devices.
  const std::unique_ptr<DeviceFactory> factory_;
  const std::unique_ptr<SharedWeights> shared_;
  std::vector<std::unique_ptr<Worker>> workers_;
  std::vector<std::thread> threads_;

  mutable std::mutex mutex_;
  std::condition_variable changed_;                   // a plan, an error or the end
  std::condition_variable done_;                      // a result or an error
  std::deque<std::unique_ptr<PendingStep>> pending_;  // submitted, not awaited
  int64_t last_submitted_ = 0;
  std::vector<int32_t> previous_rows_ = std::vector<int32_t>(info_.num_homes, 0);
  std::vector<RankStatus> ranks_;
  absl::Status error_;
  bool stopping_ = false;
};

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
  if (options.kv_dtype != "f32" && options.kv_dtype != "bf16") {
    return InvalidArgument("kv_dtype is '{}', allowed: f32, bf16", options.kv_dtype);
  }
  if (options.load_format != "auto" && options.load_format != "dummy") {
    return InvalidArgument("load_format is '{}', allowed: auto, dummy", options.load_format);
  }
  return absl::OkStatus();
}

// KV blocks per home: the flag, or what memory and use allow.
absl::StatusOr<int32_t> ChooseBlocks(const EngineOptions& options, const ModelConfig& config, DType kv_dtype,
                                     int32_t max_model_len, int64_t free_bytes) {
  const int64_t per_sequence = (max_model_len + options.block_size - 1) / options.block_size;
  const int64_t block_bytes = KvBytesPerToken(config, kv_dtype) * options.block_size;
  if (options.num_blocks > 0) return options.num_blocks;
  if (options.num_blocks < 0) return InvalidArgument("num_blocks is {}, allowed: >= 0", options.num_blocks);
  const int64_t fit =
      static_cast<int64_t>(options.memory_fraction * static_cast<double>(free_bytes) / options.num_ranks) / block_bytes;
  if (fit < 1) {
    return ResourceExhausted("no memory for KV: one block is {} bytes, {} of {} free bytes are for {} ranks",
                             block_bytes, options.memory_fraction, free_bytes, options.num_ranks);
  }
  return static_cast<int32_t>(
      std::min<int64_t>({fit, per_sequence * options.max_sequences, INT32_MAX / options.block_size}));
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

absl::StatusOr<std::unique_ptr<Engine>> CreateInProcessEngine(const EngineOptions& options, const Clock& clock,
                                                              const LoadCallback& on_progress) {
  ASSIGN_OR_RETURN(const ModelConfig config, LoadModelConfig(options.model_dir));
  RETURN_IF_ERROR(CheckOptions(options, config));
  const int ranks = options.num_ranks;
  auto placement = options.expert_rank.empty()
                       ? ExpertPlacement::Contiguous(static_cast<int>(config.num_experts), ranks)
                       : ExpertPlacement::FromMap(options.expert_rank, ranks);
  RETURN_IF_ERROR(placement.status());
  RETURN_IF_ERROR(ParallelPlan::Solo(ranks, ranks).Validate());
  const DType kv_dtype = options.kv_dtype == "bf16" ? DType::kBF16 : DType::kF32;
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
  int64_t total = SharedWeightBytes(config) + ExpertWeightBytes(config, config.num_experts);
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
  info.expert_rank = placement->expert_rank();
  ASSIGN_OR_RETURN(const int32_t num_blocks,
                   ChooseBlocks(options, config, kv_dtype, max_model_len, devices[0]->FreeBytes()));
  info.limits = {.vocab_size = static_cast<int32_t>(config.vocab_size),
                 .max_model_len = max_model_len,
                 .num_blocks = num_blocks,
                 .block_size = options.block_size,
                 .max_tokens = options.max_tokens_per_step,
                 .max_sequences = options.max_sequences};

  std::vector<std::unique_ptr<Communicator>> comms;
  if (ranks == 1) {
    comms.push_back(CreateSelfCommunicator());
  } else {
    comms = CreateSharedMemoryCommunicators(ranks, {.timeout = options.collective_timeout});
  }
  std::vector<std::unique_ptr<Worker>> workers(ranks);
  for (int r = 0; r < ranks; ++r) {
    ASSIGN_OR_RETURN(workers[r],
                     Worker::Create(config,
                                    {.limits = info.limits,
                                     .kv_dtype = kv_dtype,
                                     .masked_max_tokens = options.masked_max_tokens,
                                     .expert_rank = info.expert_rank},
                                    *shared, std::move(experts[r]), std::move(devices[r]), std::move(comms[r])));
  }
  return std::make_unique<InProcessEngine>(std::move(info), std::move(factory), std::move(shared), std::move(workers),
                                           clock);
}

}  // namespace soloist
