#include "engine/cluster/worker_session.h"

#include <algorithm>
#include <chrono>
#include <filesystem>
#include <fstream>
#include <limits>
#include <system_error>
#include <utility>
#include <vector>

#include "base/host_limits.h"
#include "base/status.h"
#include "engine/cluster/fingerprint.h"
#include "engine/model/footprint.h"
#include "engine/placement/parallel_plan.h"
#include "engine/worker/engine_options.h"
#include "spdlog/spdlog.h"

namespace soloist {
namespace {

using worker::v1::LeaderMessage;
using worker::v1::WorkerMessage;

// For a leader that is asked to take a last message.
constexpr absl::Duration kClosePatience = absl::Seconds(2);
constexpr int64_t kAllEpochs = std::numeric_limits<int64_t>::max();

}  // namespace

WorkerSession::WorkerSession(const WorkerProcessOptions& options, worker::v1::Hello hello,
                             std::unique_ptr<Device> device)
    : options_(options), hello_(std::move(hello)), device_(std::move(device)) {}

WorkerSession::~WorkerSession() = default;

WorkerSession::Outcome WorkerSession::Run() {
  stream_ = std::make_unique<LeaderStream>(
      options_.leader, [this](grpc::ByteBuffer& bytes) { OnBytes(bytes); },
      [this](const absl::Status& status) { OnEnd(status); });
  WorkerMessage hello;
  *hello.mutable_hello() = hello_;
  Send(hello);
  beats_ = std::thread([this] { SendBeats(); });

  Outcome outcome;
  for (bool running = true; running;) {
    LeaderFrame frame = Take();
    bool own_failure = false;
    if (frame.message.has_stop()) {
      const worker::v1::Stop& stop = frame.message.stop();
      outcome.status = absl::Status(static_cast<absl::StatusCode>(stop.code()), stop.reason());
      running = false;
    } else if (frame.message.kind_case() == LeaderMessage::KIND_NOT_SET) {
      const std::lock_guard lock(mutex_);
      own_failure = !step_error_.ok();
      outcome.leader_lost = !own_failure;
      outcome.status = own_failure ? step_error_ : end_status_;
      running = false;
    } else {
      outcome.status = Handle(std::move(frame));
      running = outcome.status.ok();
      own_failure = !running;
    }
    if (!own_failure) continue;
    WorkerMessage failed;
    failed.mutable_failed()->set_code(static_cast<int>(outcome.status.code()));
    failed.mutable_failed()->set_message(std::string(outcome.status.message()));
    Send(failed);
    if (rank_ >= 0) outcome.status = Annotate(outcome.status, fmt::format("rank {}", rank_));
  }
  {
    const std::lock_guard lock(mutex_);
    stopping_ = true;
  }
  stop_beating_.notify_all();
  beats_.join();
  Interrupt(kAllEpochs, Cancelled("the worker is stopping"));
  stream_->Close(kClosePatience);
  outcome.connected = stream_->connected();
  stream_.reset();
  runner_.reset();
  {
    const std::lock_guard lock(group_mutex_);
    comm_ = nullptr;
  }
  worker_.reset();
  return outcome;
}

void WorkerSession::OnBytes(grpc::ByteBuffer& bytes) {
  auto decoded = DecodeLeaderFrame(bytes);
  if (!decoded.ok()) {
    spdlog::error("worker: {}", decoded.status().message());
    return;
  }
  const LeaderMessage& message = decoded->message;
  if (message.has_bootstrap_value()) {
    std::shared_ptr<StreamBootstrapStore> store;
    {
      const std::lock_guard lock(group_mutex_);
      store = store_;
    }
    if (store != nullptr) store->OnValue(message.bootstrap_value());
    return;
  }
  if (message.has_abort_group()) {
    Interrupt(message.abort_group().epoch(), Aborted("{}", message.abort_group().reason()));
  } else if (message.has_stop()) {
    Interrupt(kAllEpochs, Cancelled("the leader says stop"));
  }
  Push(*std::move(decoded));
}

void WorkerSession::OnEnd(const absl::Status& status) {
  {
    const std::lock_guard lock(mutex_);
    ended_ = true;
    end_status_ = status.ok() ? Unavailable("the leader at {} has ended the stream", options_.leader)
                              : Annotate(status, fmt::format("the leader at {}", options_.leader));
  }
  Interrupt(kAllEpochs, Unavailable("the leader is gone"));
  arrived_.notify_all();
}

void WorkerSession::Push(LeaderFrame frame) {
  {
    const std::lock_guard lock(mutex_);
    queue_.push_back(std::move(frame));
  }
  arrived_.notify_all();
}

// The next message; an empty one when the stream has ended or a step has failed for good.
LeaderFrame WorkerSession::Take() {
  std::unique_lock lock(mutex_);
  arrived_.wait(lock, [this] { return !queue_.empty() || ended_ || !step_error_.ok(); });
  if (queue_.empty() || !step_error_.ok()) return {};
  LeaderFrame frame = std::move(queue_.front());
  queue_.pop_front();
  return frame;
}

absl::Status WorkerSession::Handle(LeaderFrame frame) {
  const LeaderMessage& message = frame.message;
  switch (message.kind_case()) {
    case LeaderMessage::kStep:
      return RunStep(message.step().epoch(), std::move(frame.plan));
    case LeaderMessage::kAssignment:
      return Assign(message.assignment());
    case LeaderMessage::kAllocate:
      return Allocate(message.allocate().num_blocks());
    case LeaderMessage::kPlace:
      return Place(message.place());
    case LeaderMessage::kJoinGroup:
      return JoinGroup(message.join_group().epoch());
    case LeaderMessage::kWarmUp:
      return WarmUp(message.warm_up().epoch());
    case LeaderMessage::kAbortGroup:
      return LeaveGroup(message.abort_group().epoch());
    default:
      return Internal("worker: unexpected message {} from the leader", static_cast<int>(message.kind_case()));
  }
}

absl::Status WorkerSession::Assign(const worker::v1::Assignment& assignment) {
  if (worker_ != nullptr) return Internal("worker: rank {} was assigned rank {}", rank_, assignment.rank());
  num_ranks_ = assignment.num_ranks();
  config_ = assignment.config();
  model_dir_ = options_.model_dir.empty() ? config_.model_dir() : options_.model_dir;
  rank_ = group_rank_ = assignment.rank();
  place_.clear_ranks();
  for (int r = 0; r < num_ranks_; ++r) place_.add_ranks(r);
  *place_.mutable_expert_rank() = config_.expert_rank();
  ASSIGN_OR_RETURN(model_, LoadModelConfig(model_dir_));
  if (assignment.spare()) return WarmPages(config_);
  spdlog::info("rank {} of {}: loading {}", rank_, num_ranks_, model_dir_);
  return Load();
}

// Reads every shard once: what a spare will need is then in the page cache.
absl::Status WorkerSession::WarmPages(const worker::v1::WorkerConfig& config) {
  RETURN_IF_ERROR(device_->BindThread());
  WorkerMessage ready;
  int64_t read = 0;
  if (config.load_format() != "dummy") {
    std::error_code error;
    std::vector<char> block(4 << 20);
    for (const auto& entry : std::filesystem::directory_iterator(model_dir_, error)) {
      if (entry.path().extension() != ".safetensors") continue;
      std::ifstream file(entry.path(), std::ios::binary);
      while (file.read(block.data(), std::ssize(block)) || file.gcount() > 0) read += file.gcount();
    }
    if (error) return NotFound("cannot read '{}': {}", model_dir_, error.message());
  }
  ready.mutable_spare_ready()->set_read_bytes(read);
  Send(ready);
  return absl::OkStatus();
}

int WorkerSession::LoadThreads() const {
  return options_.device.cpu_threads > 0 ? options_.device.cpu_threads : UsableCores();
}

absl::Status WorkerSession::Load() {
  const EngineOptions given{.model_dir = model_dir_,
                            .expert_rank = {config_.expert_rank().begin(), config_.expert_rank().end()}};
  ASSIGN_OR_RETURN(const ExpertPlacement placement, PlaceExperts(given, model_, num_ranks_));
  if (std::ssize(placement.expert_rank()) != model_.num_experts) {
    return FailedPrecondition("the leader places {} experts, the model in '{}' has {}", placement.expert_rank().size(),
                              model_dir_, model_.num_experts);
  }
  const std::vector<int> local = placement.ExpertsOf(rank_);
  limits_ = {.vocab_size = static_cast<int32_t>(model_.vocab_size),
             .max_model_len = config_.max_model_len(),
             .num_blocks = 0,
             .block_size = config_.block_size(),
             .max_tokens = config_.max_tokens(),
             .max_sequences = config_.max_sequences()};
  Device& device = *device_;
  RETURN_IF_ERROR(device.BindThread());
  const int64_t total = SharedWeightBytes(model_) + ExpertWeightBytes(model_, std::ssize(local));
  if (total > device.FreeBytes()) {
    return ResourceExhausted("weights need {} bytes, {} are free on {}", total, device.FreeBytes(), device.Name());
  }
  ASSIGN_OR_RETURN(const auto source, OpenWeights(model_, model_dir_, config_.load_format(), config_.dummy_seed()));
  const int threads = LoadThreads();
  progress_.loaded_bytes = 0;
  total_bytes_ = total;
  shared_ = std::make_unique<SharedWeights>();
  ASSIGN_OR_RETURN(*shared_, LoadSharedWeights(model_, *source, limits_.max_model_len, device, threads, progress_));
  ASSIGN_OR_RETURN(ExpertWeights experts, LoadExpertWeights(model_, *source, local, device, threads, progress_));
  total_bytes_ = 0;
  WorkerMessage loaded;
  loaded.mutable_loaded()->set_weight_bytes(shared_->bytes() + experts.bytes());
  std::shared_ptr<TraceWriter> trace;
  if (!options_.trace_file.empty()) {
    ASSIGN_OR_RETURN(trace, TraceWriter::Open(fmt::format("{}.rank{}", options_.trace_file, rank_)));
  }
  ASSIGN_OR_RETURN(worker_, Worker::Create(model_,
                                           {.limits = limits_,
                                            .kv_dtype = KvDType(config_.kv_dtype()),
                                            .masked_max_tokens = config_.masked_max_tokens(),
                                            .expert_rank = placement.expert_rank(),
                                            .profile_every = config_.profile_every(),
                                            .trace = std::move(trace)},
                                           *shared_, std::move(experts), std::move(device_), AbsentCommunicator()));
  runner_ = std::make_unique<StepRunner>(
      *worker_,
      [this](int64_t epoch, int64_t step, const HomeResult& result) {
        last_step_ = step;
        stream_->Send(EncodeResult(epoch, step, result));
      },
      [this](int64_t epoch, int64_t step, const absl::Status& status) { OnStepFailure(epoch, step, status); });
  loaded.mutable_loaded()->set_free_bytes(worker_->device().FreeBytes());
  ASSIGN_OR_RETURN(*loaded.mutable_loaded()->mutable_config_hash(), ConfigFingerprint(model_dir_));
  if (config_.load_format() == "dummy") {
    loaded.mutable_loaded()->set_checkpoint_hash(fmt::format("seed {}", config_.dummy_seed()));
  } else {
    ASSIGN_OR_RETURN(*loaded.mutable_loaded()->mutable_checkpoint_hash(), CheckpointFingerprint(model_dir_));
  }
  Send(loaded);
  return absl::OkStatus();
}

absl::Status WorkerSession::Allocate(int32_t num_blocks) {
  if (worker_ == nullptr) return Internal("worker: asked to allocate before it has loaded");
  RETURN_IF_ERROR(worker_->AllocateKv(num_blocks));
  limits_.num_blocks = num_blocks;
  WorkerMessage allocated;
  allocated.mutable_allocated()->set_num_blocks(num_blocks);
  Send(allocated);
  return absl::OkStatus();
}

absl::Status WorkerSession::WarmUp(int64_t epoch) {
  if (worker_ == nullptr || epoch != epoch_) return absl::OkStatus();
  const absl::Status status = worker_->WarmUp(nullptr);
  if (!status.ok()) {
    OnStepFailure(epoch, 0, status);
    return absl::OkStatus();
  }
  WorkerMessage ready;
  ready.mutable_ready()->set_epoch(epoch);
  Send(ready);
  return absl::OkStatus();
}

absl::Status WorkerSession::RunStep(int64_t epoch, std::vector<int32_t> words) {
  {
    const std::lock_guard lock(group_mutex_);
    if (epoch != epoch_ || epoch <= aborted_epoch_) return absl::OkStatus();
  }
  ASSIGN_OR_RETURN(const HomePlan plan, HomePlan::Parse(std::move(words)));
  runner_->Run(epoch, plan);
  return absl::OkStatus();
}

// From the rank's thread or the one that finishes steps.
void WorkerSession::OnStepFailure(int64_t epoch, int64_t step, const absl::Status& status) {
  if (!worker_->comm().error().ok()) return SendGroupFailed(epoch, step, status);
  {
    const std::lock_guard lock(mutex_);
    step_error_ = Annotate(status, fmt::format("step {}", step));
  }
  arrived_.notify_all();
}

void WorkerSession::SendBeats() {
  std::unique_lock lock(mutex_);
  const auto period = absl::ToChronoNanoseconds(options_.beat_period);
  while (!stop_beating_.wait_for(lock, period, [this] { return stopping_; })) {
    lock.unlock();
    WorkerMessage message;
    if (const int64_t total = total_bytes_; total > 0) {
      message.mutable_loading()->set_loaded_bytes(progress_.loaded_bytes);
      message.mutable_loading()->set_total_bytes(total);
    } else {
      message.mutable_beat()->set_step(last_step_);
    }
    Send(message);
    lock.lock();
  }
}

}  // namespace soloist
