#include "server/frontend.h"

#include <utility>
#include <variant>

#include "base/logging.h"
#include "base/status.h"

namespace soloist {

Frontend::Frontend(FrontendOptions options, ModelDescription model, std::unique_ptr<const Tokenizer> tokenizer,
                   const Clock& clock)
    : options_(options),
      model_(std::move(model)),
      tokenizer_(std::move(tokenizer)),
      clock_(clock),
      unix_offset_ns_(clock.UnixNs() - clock.NowNs()),
      start_unix_ns_(clock.UnixNs()),
      prompt_threads_(std::make_unique<WorkQueue>(options_.num_threads)),
      stream_threads_(std::make_unique<WorkQueue>(options_.num_threads)) {}

Frontend::~Frontend() { Stop(); }

void Frontend::Start(const Engine& engine, StepLoop& loop) {
  if (draining_) loop.Drain();
  engine_ = &engine;
  loop_ = &loop;
}

void Frontend::Fail(const absl::Status& status) {
  const std::lock_guard lock(mutex_);
  failure_ = status;
}

void Frontend::Stop() {
  // Prompts first: they end in posts to the other.
  prompt_threads_.reset();
  stream_threads_.reset();
}

absl::Status Frontend::Accepting() const {
  if (draining_) return Unavailable("the server is draining: send the request to another one");
  if (loop() == nullptr) {
    const std::lock_guard lock(mutex_);
    if (!failure_.ok()) return Unavailable("the model could not be loaded: {}", failure_.message());
    return Unavailable("the model is loading: try again later");
  }
  return absl::OkStatus();
}

absl::Status Frontend::Reserve(const std::string& request_id) {
  const std::lock_guard lock(mutex_);
  if (static_cast<int32_t>(open_.size()) >= options_.limits.max_streams) {
    return ResourceExhausted("{} requests are open, the limit is {}", open_.size(), options_.limits.max_streams);
  }
  if (!open_.insert(request_id).second) return AlreadyExists("request_id '{}' is in use", request_id);
  return absl::OkStatus();
}

void Frontend::Generate(GenerationRequest request, const Callbacks& callbacks) {
  absl::Status status = Accepting();
  if (status.ok()) status = Validate(request, options_.limits, engine()->Info().limits);
  if (!status.ok()) return callbacks.refused(status);
  if (!request.request_id.has_value()) request.request_id = DrawRequestId();
  if (auto* ids = std::get_if<std::vector<int32_t>>(&request.prompt)) {
    std::vector<int32_t> prompt = std::move(*ids);
    status = Admit(request, std::move(prompt), callbacks);
    if (!status.ok()) callbacks.refused(status);
    return;
  }
  const size_t bytes = std::get<std::string>(request.prompt).size();
  auto tokenize_and_admit = [this, callbacks, request = std::move(request)] {
    std::vector<int32_t> prompt = tokenizer_->Encode(
        std::get<std::string>(request.prompt),
        {.add_special_tokens = request.add_special_tokens, .parse_special_tokens = request.parse_special_tokens});
    const absl::Status admitted = Admit(request, std::move(prompt), callbacks);
    if (!admitted.ok()) callbacks.refused(admitted);
  };
  if (bytes <= kInlinePromptBytes) return tokenize_and_admit();
  status = PostLarge(std::move(tokenize_and_admit));
  if (!status.ok()) callbacks.refused(status);
}

absl::Status Frontend::Admit(const GenerationRequest& r, std::vector<int32_t> prompt, const Callbacks& callbacks) {
  const auto prompt_tokens = static_cast<int32_t>(prompt.size());
  ASSIGN_OR_RETURN(Request request, BuildRequest(r, std::move(prompt), model_.defaults, engine()->Info().limits));
  request.id = *r.request_id;
  RETURN_IF_ERROR(Reserve(request.id));
  OutputStreamOptions options;
  options.request_id = request.id;
  options.prompt_tokens = prompt_tokens;
  options.num_outputs = request.num_outputs;
  options.skip_special_tokens = r.skip_special_tokens;
  options.stop_strings = r.stop_strings;
  options.include_stop = r.include_stop;
  options.stop_tokens.insert(r.stop_token_ids.begin(), r.stop_token_ids.end());
  if (!r.ignore_eos) options.stop_tokens.insert(model_.eos_token_ids.begin(), model_.eos_token_ids.end());
  options.max_buffered_tokens = options_.limits.max_buffered_tokens;
  options.max_buffered_bytes = options_.limits.max_buffered_bytes;
  auto stream = std::make_shared<OutputStream>(
      std::move(options), *tokenizer_, clock_, callbacks.ready,
      [this, id = request.id](int32_t output) { loop()->Cancel(id, output, FinishReason::kStop); });
  request.sink = stream;
  const uint64_t seed = request.sampling.seed;
  const std::string id = request.id;
  const absl::Status added = loop()->Add(std::move(request));
  if (!added.ok()) {
    Closed(id);
    return added;
  }
  spdlog::debug("request {}: accepted, {} prompt tokens", id, prompt_tokens);
  callbacks.accepted(std::move(stream), seed);
  return absl::OkStatus();
}

void Frontend::Cancel(const std::string& request_id) { loop()->Cancel(request_id, -1, FinishReason::kCancelled); }

absl::Status Frontend::Abort(const std::string& request_id) {
  {
    const std::lock_guard lock(mutex_);
    if (!open_.contains(request_id)) return NotFound("request_id '{}' is not open", request_id);
  }
  Cancel(request_id);
  return absl::OkStatus();
}

void Frontend::Closed(const std::string& request_id) {
  const std::lock_guard lock(mutex_);
  open_.erase(request_id);
}

absl::Status Frontend::PostLarge(std::function<void()> job) {
  if (pending_large_.fetch_add(1) >= options_.limits.max_pending_prompts) {
    pending_large_ -= 1;
    return ResourceExhausted("{} large prompts are waiting to be tokenized, the limit is {}",
                             options_.limits.max_pending_prompts, options_.limits.max_pending_prompts);
  }
  prompt_threads_->Post([this, job = std::move(job)] {
    job();
    pending_large_ -= 1;
  });
  return absl::OkStatus();
}

void Frontend::Drain() {
  draining_ = true;
  if (StepLoop* l = loop()) l->Drain();
}

int32_t Frontend::open_streams() const {
  const std::lock_guard lock(mutex_);
  return static_cast<int32_t>(open_.size());
}

HealthReport Frontend::Health() const {
  HealthReport report;
  const StepLoop* l = loop();
  if (l == nullptr) {
    const std::lock_guard lock(mutex_);
    report.state = failure_.ok() ? ServerState::kStarting : ServerState::kNotReady;
    report.checks.push_back({.name = "engine",
                             .ok = false,
                             .message = failure_.ok() ? "the model is loading" : std::string(failure_.message()),
                             .last_step_age_ns = {},
                             .busy_ns = {}});
    return report;
  }
  const absl::Status engine_health = l->health();
  report.checks.push_back({.name = "engine",
                           .ok = engine_health.ok(),
                           .message = engine_health.ok() ? "running" : std::string(engine_health.message()),
                           .last_step_age_ns = {},
                           .busy_ns = {}});
  const LoadSnapshot load = l->Load();
  report.checks.push_back({.name = "admission",
                           .ok = !draining_,
                           .message = draining_ ? "draining" : fmt::format("{} requests wait", load.waiting_requests),
                           .last_step_age_ns = {},
                           .busy_ns = {}});
  const int64_t now = clock_.NowNs();
  bool ranks_ok = true;
  for (const RankStatus& rank : engine()->Ranks()) {
    HealthReport::Check check{.name = fmt::format("rank/{}", rank.rank),
                              .ok = rank.state == RankState::kReady,
                              .message = rank.message,
                              .last_step_age_ns = {},
                              .busy_ns = {}};
    if (rank.last_step_ns != 0) check.last_step_age_ns = now - rank.last_step_ns;
    if (rank.busy_since_ns != 0) {
      check.busy_ns = std::max<int64_t>(0, now - rank.busy_since_ns);
      if (absl::Nanoseconds(*check.busy_ns) > options_.stall_after) {
        check.ok = false;
        check.message = fmt::format("its step has been running for {} s, more than {} s",
                                    *check.busy_ns / 1'000'000'000, absl::ToInt64Seconds(options_.stall_after));
      }
    }
    if (check.ok && check.message.empty()) check.message = fmt::format("finished step {}", rank.last_step);
    ranks_ok = ranks_ok && check.ok;
    report.checks.push_back(std::move(check));
  }
  report.state = !engine_health.ok() ? ServerState::kNotReady
                 : draining_         ? ServerState::kDraining
                 : !ranks_ok         ? ServerState::kDegraded
                                     : ServerState::kReady;
  return report;
}

}  // namespace soloist
