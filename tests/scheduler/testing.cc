#include "tests/scheduler/testing.h"

#include <algorithm>
#include <cmath>
#include <utility>

#include "base/check.h"
#include "gtest/gtest.h"

namespace soloist {

bool RecordingSink::OnToken(TokenEvent event) {
  const std::lock_guard lock(mutex_);
  Output& output = outputs_.at(event.output_index);
  output.after_finish |= output.num_finishes > 0;
  if (accept_ >= 0 && static_cast<int>(output.tokens.size()) >= accept_) return false;
  output.tokens.push_back(event.token);
  output.logprobs.push_back(event.logprob);
  output.num_top.push_back(event.top_logprobs.size());
  output.steps.push_back(step_ == nullptr ? 0 : *step_);
  return true;
}

bool RecordingSink::OnPromptLogprobs(const PromptLogprobs& event) {
  const std::lock_guard lock(mutex_);
  EXPECT_EQ(event.first, scores_.size() + 1) << "not behind the last";
  EXPECT_GT(event.size(), 0);
  EXPECT_EQ(event.logprobs.size(), event.tokens.size());
  EXPECT_EQ(event.top_tokens.size(), event.tokens.size() * event.num_top);
  EXPECT_EQ(event.top_logprobs.size(), event.top_tokens.size());
  for (const Output& output : outputs_) EXPECT_TRUE(output.tokens.empty()) << "a token came before";
  scores_.num_top = event.num_top;
  const auto append = [](auto& to, const auto& from) { to.insert(to.end(), from.begin(), from.end()); };
  append(scores_.tokens, event.tokens);
  append(scores_.logprobs, event.logprobs);
  append(scores_.top_tokens, event.top_tokens);
  append(scores_.top_logprobs, event.top_logprobs);
  return true;
}

void RecordingSink::OnFinish(const FinishEvent& event) {
  const std::lock_guard lock(mutex_);
  Output& output = outputs_.at(event.output_index);
  ++output.num_finishes;
  output.finish = event;
}

std::vector<RecordingSink::Output> RecordingSink::outputs() const {
  const std::lock_guard lock(mutex_);
  return outputs_;
}

PromptLogprobs RecordingSink::scores() const {
  const std::lock_guard lock(mutex_);
  return scores_;
}

bool Deliver(OutputEvent event) {
  TokenSink& sink = *event.request->sink;
  if (auto* token = std::get_if<TokenEvent>(&event.what)) return sink.OnToken(std::move(*token));
  if (const auto* scores = std::get_if<PromptLogprobs>(&event.what)) return sink.OnPromptLogprobs(*scores);
  sink.OnFinish(std::get<FinishEvent>(event.what));
  return true;
}

int RecordingSink::num_finished() const {
  const std::lock_guard lock(mutex_);
  return static_cast<int>(std::ranges::count_if(outputs_, [](const Output& o) { return o.num_finishes > 0; }));
}

SamplingRow RowOf(const Request& request, int32_t output_index, int32_t made) {
  const SamplingParams& p = request.sampling;
  SamplingRow row;
  row.temperature = p.temperature;
  row.repetition_penalty = p.repetition_penalty;
  row.presence_penalty = p.presence_penalty;
  row.frequency_penalty = p.frequency_penalty;
  row.seed_low = static_cast<uint32_t>(p.seed);
  row.seed_high = static_cast<uint32_t>(p.seed >> 32);
  row.output_index = output_index;
  row.position = static_cast<int32_t>(request.prompt.size()) + made;
  return row;
}

std::vector<LogitBias> BiasOf(const SamplingParams& params) {
  std::vector<LogitBias> bias;
  for (const auto& [token, value] : params.logit_bias) bias.push_back({token, value <= -100 ? -HUGE_VALF : value});
  return bias;
}

Reference ReferenceRun(const Request& request, int32_t output_index, const std::vector<int32_t>& eos_token_ids,
                       int32_t vocab_size) {
  const SamplingParams& p = request.sampling;
  std::vector<int32_t> stops = p.stop_token_ids;
  if (!p.ignore_eos) stops.insert(stops.end(), eos_token_ids.begin(), eos_token_ids.end());
  SimulatedSequence sequence;
  for (const int32_t token : request.prompt) sequence.Append(token);
  Reference reference;
  if (p.max_tokens == 0) reference.reason = FinishReason::kLength;
  while (reference.reason == FinishReason::kNone) {
    const int32_t made = static_cast<int32_t>(reference.tokens.size());
    const SamplingRow row = RowOf(request, output_index, made);
    std::vector<LogitBias> bias = BiasOf(p);
    for (const int32_t token : stops) {
      if (made < p.min_tokens) bias.push_back({token, -HUGE_VALF});
    }
    std::map<int32_t, int32_t> counts;
    if (p.repetition_penalty != 1) {
      for (const int32_t token : request.prompt) counts[token] = 0;
    }
    for (const int32_t token : reference.tokens) ++counts[token];
    std::vector<TokenHistory> history;
    for (const auto& [token, count] : counts) history.push_back({token, count});
    const int32_t token = sequence.Sample(row, bias, history, -1, vocab_size);
    sequence.Append(token);
    reference.tokens.push_back(token);
    if (made + 1 > p.min_tokens && std::ranges::find(stops, token) != stops.end()) {
      reference.reason = FinishReason::kStop;
      reference.stop_token = token;
    } else if (made + 1 == p.max_tokens) {
      reference.reason = FinishReason::kLength;
    }
  }
  return reference;
}

void ExpectScores(const Request& request, const RecordingSink& sink, int32_t vocab_size) {
  const PromptLogprobs scores = sink.scores();
  const std::vector<RecordingSink::Output> outputs = sink.outputs();
  const bool cancelled = std::ranges::all_of(
      outputs, [](const auto& o) { return o.tokens.empty() && o.finish.reason == FinishReason::kCancelled; });
  const int32_t all = request.sampling.num_prompt_logprobs < 0 ? 0 : std::ssize(request.prompt) - 1;
  if (!cancelled) {
    EXPECT_EQ(scores.size(), all) << request.id;
  }
  ASSERT_LE(scores.size(), all) << request.id;
  SimulatedSequence sequence;
  for (int32_t i = 0; i < scores.size(); ++i) {
    sequence.Append(request.prompt[i]);
    EXPECT_EQ(scores.tokens[i], request.prompt[i + 1]) << request.id << " token " << i + 1;
    EXPECT_EQ(scores.logprobs[i], sequence.Logprob(request.prompt[i + 1])) << request.id << " token " << i + 1;
    for (int32_t k = 0; k < scores.num_top; ++k) {
      EXPECT_EQ(scores.top_tokens[i * scores.num_top + k], (sequence.MostLikely(vocab_size) + k) % vocab_size);
    }
  }
  if (scores.size() > 0) {
    EXPECT_EQ(scores.num_top, request.sampling.num_prompt_logprobs);
  }
}

PlanLimits TestLimits(int32_t num_blocks, int32_t block_size) {
  return {.vocab_size = 97,
          .max_model_len = 512,
          .num_blocks = num_blocks,
          .block_size = block_size,
          .max_tokens = 512,
          .max_sequences = 64};
}

Request MakeRequest(const std::string& id, std::vector<int32_t> prompt, int32_t max_tokens) {
  Request request;
  request.id = id;
  request.prompt = std::move(prompt);
  request.sampling.max_tokens = max_tokens;
  return request;
}

Driver::Driver(const SchedulerOptions& options, const SimulatedOptions& engine)
    : options_(options), engine_(engine), scheduler_(options, engine_.Info()) {}

absl::Status Driver::Add(Request request) {
  auto sink = std::make_shared<RecordingSink>(std::max(1, request.num_outputs));
  sink->set_step(&steps_);
  request.sink = sink;
  if (absl::Status status = CheckRequest(request, engine_.Info().limits); !status.ok()) return status;
  Known known{request, std::vector<bool>(request.num_outputs)};
  known.request.sink = nullptr;
  CHECK(requests_.emplace(request.id, std::move(known)).second);
  sinks_[request.id] = std::move(sink);
  scheduler_.Add(std::move(request), now_ns_);
  return absl::OkStatus();
}

void Driver::Cancel(const std::string& id, int32_t output_index) {
  if (const auto it = requests_.find(id); it != requests_.end()) {
    for (int32_t i = 0; i < it->second.request.num_outputs; ++i) {
      if (output_index == -1 || output_index == i) it->second.cancelled[i] = true;
    }
  }
  scheduler_.Cancel(id, output_index, FinishReason::kCancelled);
  Deliver();
}

bool Driver::Turn(int depth) {
  ++now_ns_;
  if (recovering_) {
    TryRecover();
    return true;
  }
  std::optional<StepPlan> plan;
  const int32_t requests = scheduler_.num_requests();
  if (scheduler_.plans_in_flight() < depth) plan = scheduler_.Schedule(now_ns_);
  Deliver();
  const bool ended = scheduler_.num_requests() < requests;
  const bool submitted = plan.has_value();
  if (submitted) {
    if (observer) observer(*plan);
    if (Lost(engine_.Submit(*std::move(plan)))) return true;
  }
  const int in_flight = scheduler_.plans_in_flight();
  if (in_flight < depth && (submitted || in_flight == 0)) return submitted || ended;
  absl::StatusOr<StepResult> result = engine_.Await();
  if (Lost(result.status())) return true;
  ++steps_;
  CHECK_OK(scheduler_.Commit(*result, now_ns_));
  Deliver();
  return true;
}

bool Driver::Lost(const absl::Status& status) {
  recovering_ = absl::IsUnavailable(status);
  if (!recovering_) CHECK_OK(status);
  return recovering_;
}

void Driver::TryRecover() {
  absl::StatusOr<Recovery> recovery = engine_.Recover(absl::ZeroDuration());
  if (absl::IsDeadlineExceeded(recovery.status())) return;
  CHECK_OK(recovery.status());
  if (recovery_observer) recovery_observer(*recovery);
  recovering_ = false;
  CHECK_OK(scheduler_.Recover(*recovery));
}

void Driver::RunToEnd(int64_t max_turns, int depth) {
  while (scheduler_.num_requests() > 0 || scheduler_.plans_in_flight() > 0) {
    ASSERT_GT(max_turns--, 0) << scheduler_.num_requests() << " requests starve";
    const bool done = Turn(depth);
    ASSERT_TRUE(done || scheduler_.num_requests() > 0);
  }
  Deliver();
  const absl::Status status = scheduler_.CheckIntegrity(/*idle=*/true);
  EXPECT_TRUE(status.ok()) << status;
}

void Driver::Deliver() {
  for (OutputEvent& event : scheduler_.TakeEvents()) {
    EXPECT_TRUE(soloist::Deliver(std::move(event)));
  }
}

int64_t Driver::ExpectReference() const {
  int64_t compared = 0;
  for (const auto& [id, known] : requests_) {
    const std::vector<RecordingSink::Output> outputs = sinks_.at(id)->outputs();
    ExpectScores(known.request, *sinks_.at(id), engine_.Info().limits.vocab_size);
    for (int32_t i = 0; i < known.request.num_outputs; ++i) {
      const RecordingSink::Output& output = outputs[i];
      Reference reference = ReferenceRun(known.request, i, options_.eos_token_ids, engine_.Info().limits.vocab_size);
      EXPECT_EQ(output.num_finishes, 1) << id << " output " << i;
      EXPECT_FALSE(output.after_finish) << id;
      if (output.finish.reason == FinishReason::kCancelled) {
        EXPECT_TRUE(known.cancelled[i]) << id;
        EXPECT_LE(output.tokens.size(), reference.tokens.size());
        reference.tokens.resize(std::min(reference.tokens.size(), output.tokens.size()));
      } else {
        EXPECT_EQ(output.finish.reason, reference.reason) << id;
        EXPECT_EQ(output.finish.stop_token, reference.stop_token) << id;
      }
      EXPECT_EQ(output.tokens, reference.tokens) << id << " output " << i;
      for (size_t t = 0; t < output.tokens.size(); ++t) {
        EXPECT_EQ(output.logprobs[t], -1.0f / static_cast<float>(output.tokens[t] + 1)) << id << " token " << t;
        EXPECT_EQ(output.num_top[t], std::max(0, known.request.sampling.num_top_logprobs)) << id << " token " << t;
      }
      compared += static_cast<int64_t>(output.tokens.size());
    }
  }
  return compared;
}

Request RandomRequest(std::mt19937_64& random, const std::string& id, const PlanLimits& limits, int32_t max_length) {
  const auto below = [&random](int n) { return static_cast<int32_t>(random() % static_cast<uint64_t>(n)); };
  Request request;
  request.id = id;
  const int32_t length = 1 + below(max_length - 1);
  // Three families of prompts, each a prefix of one text, some with a tail of their own.
  const int32_t family = below(3), shared = below(3) == 0 ? below(length) : length;
  for (int32_t i = 0; i < length; ++i) {
    request.prompt.push_back(i < shared ? (i * (family + 2) + family) % limits.vocab_size : below(limits.vocab_size));
  }
  SamplingParams& p = request.sampling;
  p.max_tokens = 1 + below(std::min(40, max_length - length));
  p.temperature = below(3) == 0 ? 0.0f : 1.0f;
  p.seed = random();
  if (below(3) == 0) p.repetition_penalty = 1.3f;
  if (below(3) == 0) p.presence_penalty = 0.5f;
  if (below(4) == 0) p.frequency_penalty = -0.5f;
  if (below(3) == 0) p.min_tokens = below(p.max_tokens + 1);
  p.ignore_eos = below(3) == 0;
  if (below(3) == 0) p.stop_token_ids = {below(limits.vocab_size), below(limits.vocab_size)};
  if (below(4) == 0) p.logit_bias = {{below(limits.vocab_size), -100.0f}, {below(limits.vocab_size), 2.0f}};
  if (below(4) == 0) p.num_top_logprobs = below(4);
  request.num_outputs = below(4) == 0 ? 1 + below(4) : 1;
  request.priority = below(3) == 0 ? below(3) - 1 : 0;
  if (below(4) == 0) request.cache_salt = below(2) == 0 ? "red" : "blue";
  if (below(4) == 0) {
    p.num_prompt_logprobs = below(4);
    if (below(3) == 0) p.max_tokens = p.min_tokens = 0;
  }
  return request;
}

}  // namespace soloist
