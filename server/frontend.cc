#include "server/frontend.h"

#include <ctime>
#include <utility>
#include <variant>

#include "base/logging.h"
#include "base/status.h"
#include "fmt/chrono.h"
#include "server/request_log.h"

namespace soloist {
namespace {

// Where the engine gives none.
std::string PlainMessage(const RankStatus& rank) {
  switch (rank.state) {
    case RankState::kStarting:
      return "starting";
    case RankState::kReady:
      return fmt::format("finished step {}", rank.last_step);
    case RankState::kLost:
      return "lost; the engine recovers";
    case RankState::kFailed:
      break;
  }
  return "failed";
}

}  // namespace

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
  // Owned by whoever may still post: outputs end after the front end has stopped.
  auto mask_threads = std::make_shared<WorkQueue>(options_.num_threads);
  GrammarOptions options;
  options.limits = options_.limits.output_form;
  grammars_ = GrammarCompiler::Create(
      *tokenizer_, engine.Info().limits.vocab_size, model_.eos_token_ids, options,
      [queue = std::move(mask_threads)](std::function<void()> job) { queue->Post(std::move(job)); });
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

absl::Status Frontend::Reserve(const std::string& request_id, const std::string& trace_parent) {
  const std::lock_guard lock(mutex_);
  if (static_cast<int32_t>(open_.size()) >= options_.limits.max_streams) {
    return ResourceExhausted("{} requests are open, the limit is {}", open_.size(), options_.limits.max_streams);
  }
  if (!open_.try_emplace(request_id, Open{.trace_parent = trace_parent, .stream = nullptr}).second)
    return AlreadyExists("request_id '{}' is in use", request_id);
  return absl::OkStatus();
}

void Frontend::Refuse(const absl::Status& status, const Callbacks& callbacks) {
  metrics_.Refused(status.code());
  callbacks.refused(status);
}

void Frontend::Generate(GenerationRequest request, const Callbacks& callbacks) {
  const int64_t received_ns = clock_.NowNs();
  absl::Status status = Accepting();
  if (status.ok()) status = Validate(request, options_.limits, engine()->Info().limits);
  if (!status.ok()) return Refuse(status, callbacks);
  if (!request.request_id.has_value()) request.request_id = DrawRequestId();
  const auto* text = std::get_if<std::string>(&request.prompt);
  const bool large = text != nullptr && text->size() > kInlinePromptBytes;
  const bool compiles = request.output_form.has_value() && grammars_->Find(*request.output_form) == nullptr;
  auto admit = [this, callbacks, received_ns, request = std::move(request)]() mutable {
    const absl::Status admitted = TokenizeAndAdmit(std::move(request), received_ns, callbacks);
    if (!admitted.ok()) Refuse(admitted, callbacks);
  };
  if (!large && !compiles) return admit();
  status = large ? PostLarge(std::move(admit))
                 : PostBounded(pending_forms_, options_.limits.max_pending_forms,
                               "requests are waiting for their response format", std::move(admit));
  if (!status.ok()) Refuse(status, callbacks);
}

absl::Status Frontend::TokenizeAndAdmit(GenerationRequest r, int64_t received_ns, const Callbacks& callbacks) {
  if (auto* ids = std::get_if<std::vector<int32_t>>(&r.prompt)) {
    std::vector<int32_t> prompt = std::move(*ids);
    return Admit(r, std::move(prompt), received_ns, callbacks);
  }
  return Admit(r,
               tokenizer_->Encode(std::get<std::string>(r.prompt), {.add_special_tokens = r.add_special_tokens,
                                                                    .parse_special_tokens = r.parse_special_tokens}),
               received_ns, callbacks);
}

absl::Status Frontend::Admit(const GenerationRequest& r, std::vector<int32_t> prompt, int64_t received_ns,
                             const Callbacks& callbacks) {
  const auto prompt_tokens = static_cast<int32_t>(prompt.size());
  const int32_t first_prompt_token = prompt.empty() ? 0 : prompt.front();
  ASSIGN_OR_RETURN(Request request, BuildRequest(r, std::move(prompt), model_.defaults, engine()->Info().limits));
  request.id = *r.request_id;
  if (r.output_form.has_value()) {
    ASSIGN_OR_RETURN(request.constraint, grammars_->Compile(*r.output_form));
  }
  RETURN_IF_ERROR(Reserve(request.id, r.trace_parent));
  OutputStreamOptions options;
  options.request_id = request.id;
  options.prompt_tokens = prompt_tokens;
  options.first_prompt_token = first_prompt_token;
  options.received_ns = received_ns;
  options.metrics = &metrics_;
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
  {
    const std::lock_guard lock(mutex_);
    if (added.ok()) {
      open_.at(id).stream = stream;
    } else {
      open_.erase(id);
    }
  }
  RETURN_IF_ERROR(added);
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
  Open closed;
  {
    const std::lock_guard lock(mutex_);
    const auto it = open_.find(request_id);
    if (it == open_.end()) return;
    closed = std::move(it->second);
    open_.erase(it);
  }
  if (!options_.log_requests || closed.stream == nullptr) return;
  closed.stream->Process();
  spdlog::info("request {}", RequestLogLine(*closed.stream, closed.trace_parent));
}

absl::Status Frontend::PostLarge(std::function<void()> job) {
  return PostBounded(pending_large_, options_.limits.max_pending_prompts, "large prompts are waiting to be tokenized",
                     std::move(job));
}

absl::Status Frontend::PostBounded(std::atomic<int32_t>& pending, int32_t limit, const char* what,
                                   std::function<void()> job) {
  if (pending.fetch_add(1) >= limit) {
    pending -= 1;
    return ResourceExhausted("{} {}, the limit is {}", limit, what, limit);
  }
  prompt_threads_->Post([&pending, job = std::move(job)] {
    job();
    pending -= 1;
  });
  return absl::OkStatus();
}

GrammarStats Frontend::grammar_stats() const { return loop() == nullptr ? GrammarStats() : grammars_->stats(); }

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
  const EngineCondition condition = l->condition();
  const LoadSnapshot load = l->Load();
  report.checks.push_back(EngineCheck(condition, load));
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
    if (check.message.empty()) check.message = PlainMessage(rank);
    ranks_ok = ranks_ok && check.ok;
    report.checks.push_back(std::move(check));
  }
  const bool degraded = !ranks_ok || condition.state == EngineCondition::State::kRecovering;
  report.state = condition.state == EngineCondition::State::kFailed ? ServerState::kNotReady
                 : draining_                                        ? ServerState::kDraining
                 : degraded                                         ? ServerState::kDegraded
                                                                    : ServerState::kReady;
  return report;
}

HealthReport::Check Frontend::EngineCheck(const EngineCondition& condition, const LoadSnapshot& load) const {
  HealthReport::Check check{.name = "engine",
                            .ok = condition.state == EngineCondition::State::kRunning,
                            .message = condition.message,
                            .last_step_age_ns = {},
                            .busy_ns = {}};
  if (check.ok) check.message = "running";
  if (condition.state != EngineCondition::State::kRecovering) return check;
  check.message = fmt::format(
      "recovering since {:%FT%TZ} ({:.1f} s): {}; waiting until the ranks are whole again, with {} running and {} "
      "waiting "
      "requests",
      fmt::gmtime(static_cast<std::time_t>(UnixNs(condition.since_ns) / 1'000'000'000)),
      static_cast<double>(clock_.NowNs() - condition.since_ns) * 1e-9, condition.message, load.running_requests,
      load.waiting_requests);
  return check;
}

}  // namespace soloist
