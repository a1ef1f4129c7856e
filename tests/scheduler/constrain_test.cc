// Outputs under a constraint: every token is one that its mask allows and the one that it must be, whatever is in
// flight, however late the masks come, through preemption and lost ranks; and how such outputs end.
#include <atomic>
#include <chrono>
#include <cmath>
#include <functional>
#include <memory>
#include <optional>
#include <random>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "base/clock.h"
#include "base/status.h"
#include "gtest/gtest.h"
#include "scheduler/token_constraint.h"
#include "tests/scheduler/testing.h"

namespace soloist {
namespace {

constexpr int32_t kVocab = 97, kEos = 96;

// After the tokens so far: those t with (t + sum of them) % 5 == 0, and the end token from the `may_end`-th on. Nothing
// can follow `complete` tokens.
struct Form {
  int32_t may_end = 1 << 30;
  int32_t complete = 1 << 30;
  int32_t broken = 1 << 30;  // there, no token continues it
  int late = 0;              // polls before an answer is there
};

NextTokens After(const Form& form, const std::vector<int32_t>& tokens) {
  const auto made = static_cast<int32_t>(tokens.size());
  NextTokens next;
  next.mask.assign(TokenMaskWords(kVocab), 0);
  if (made >= form.broken) next.status = InvalidArgument("broken after {} tokens", made);
  next.complete = made >= form.complete;
  int32_t sum = 0;
  for (const int32_t token : tokens) sum += token;
  const auto allow = [&](int32_t t) { next.mask[t / 32] |= static_cast<int32_t>(1u << (t % 32)); };
  for (int32_t t = 0; t < kEos; ++t) {
    if ((t + sum) % 5 == 0) allow(t);
  }
  if (made >= form.may_end) allow(kEos);
  return next;
}

class FormConstraint final : public TokenConstraint {
 public:
  FormConstraint(const Form& form, std::function<void()> ready) : form_(form), ready_(std::move(ready)) { Begin(); }
  const NextTokens* Poll() override { return polls_-- > 0 ? nullptr : &next_; }
  void Advance(int32_t token) override {
    EXPECT_TRUE(AllowsToken(next_.mask, token));
    tokens_.push_back(token);
    Begin();
  }

 private:
  void Begin() {
    polls_ = form_.late;
    next_ = After(form_, tokens_);
    if (ready_) ready_();
  }
  const Form form_;
  const std::function<void()> ready_;
  std::vector<int32_t> tokens_;
  NextTokens next_;
  int polls_ = 0;
};

class FormSource final : public ConstraintSource {
 public:
  explicit FormSource(const Form& form) : form_(form) {}
  std::unique_ptr<TokenConstraint> Start(std::function<void()> ready) const override {
    return std::make_unique<FormConstraint>(form_, std::move(ready));
  }

 private:
  const Form form_;
};

// What the output must be, with no batch and no plan.
Reference Expected(const Request& request, int32_t output_index, const Form& form) {
  const SamplingParams& p = request.sampling;
  SimulatedSequence sequence;
  for (const int32_t token : request.prompt) sequence.Append(token);
  Reference reference;
  for (;;) {
    const auto made = static_cast<int32_t>(reference.tokens.size());
    const NextTokens next = After(form, reference.tokens);
    if (made == p.max_tokens) {
      reference.reason = FinishReason::kLength;
      return reference;
    }
    if (next.complete || !next.status.ok()) {
      reference.reason = next.status.ok() ? FinishReason::kStop : FinishReason::kError;
      return reference;
    }
    const SamplingRow row = RowOf(request, output_index, made);
    std::vector<LogitBias> bias = BiasOf(p);
    if (p.ignore_eos || made < p.min_tokens) bias.push_back({kEos, -HUGE_VALF});
    const int32_t token = sequence.Sample(row, bias, {}, -1, kVocab, next.mask);
    sequence.Append(token);
    reference.tokens.push_back(token);
    if (token == kEos) {
      reference.reason = FinishReason::kStop;
      reference.stop_token = kEos;
      return reference;
    }
  }
}

Request Constrained(const std::string& id, std::vector<int32_t> prompt, int32_t max_tokens, const Form& form) {
  Request request = MakeRequest(id, std::move(prompt), max_tokens);
  request.sampling.seed = std::hash<std::string>()(id);
  request.constraint = std::make_shared<FormSource>(form);
  return request;
}

const SchedulerOptions kOptions = {.max_tokens_per_step = 24, .max_sequences = 16, .eos_token_ids = {kEos}};

SimulatedOptions Simulated(int32_t num_blocks) {
  SimulatedOptions options;
  options.limits = TestLimits(num_blocks, 4);
  return options;
}

void ExpectOutputs(const Driver& driver, const Request& request, const Form& form) {
  const auto outputs = driver.sink(request.id).outputs();
  ExpectScores(request, driver.sink(request.id), kVocab);
  for (int32_t i = 0; i < request.num_outputs; ++i) {
    const Reference expected = Expected(request, i, form);
    EXPECT_EQ(outputs[i].num_finishes, 1) << request.id;
    EXPECT_EQ(outputs[i].tokens, expected.tokens) << request.id << " output " << i;
    EXPECT_EQ(outputs[i].finish.reason, expected.reason) << request.id << ": " << outputs[i].finish.error;
    EXPECT_EQ(outputs[i].finish.stop_token, expected.stop_token) << request.id;
  }
}

// Alone, in every second step: one plan is in flight until its token is committed.
TEST(ConstrainTest, EveryTokenIsAllowedAndEndsAsTheFormSays) {
  const struct {
    Form form;
    SamplingParams sampling;
  } cases[] = {
      {{}, {.max_tokens = 30}},
      {{.complete = 7}, {.max_tokens = 30}},
      {{.complete = 0}, {.max_tokens = 30}},
      {{.may_end = 3}, {.max_tokens = 300}},
      {{.may_end = 0}, {.max_tokens = 300, .min_tokens = 40}},
      {{.may_end = 3, .complete = 60}, {.max_tokens = 300, .ignore_eos = true}},
      {{.broken = 5}, {.max_tokens = 30}},
      {{.complete = 9, .late = 3}, {.temperature = 0, .max_tokens = 30}},
  };
  int n = 0;
  for (const auto& c : cases) {
    Driver driver(kOptions, Simulated(256));
    Request request = Constrained(fmt::format("case {}", n++), {1, 2, 3, 4, 5, 6, 7}, 1, c.form);
    const uint64_t seed = request.sampling.seed;
    request.sampling = c.sampling;
    request.sampling.seed = seed;
    request.num_outputs = 3;
    ASSERT_TRUE(driver.Add(request).ok());
    driver.RunToEnd(5000);
    ExpectOutputs(driver, request, c.form);
    const FinishEvent finish = driver.sink(request.id).outputs()[0].finish;
    if (finish.reason == FinishReason::kError) {
      EXPECT_EQ(finish.error.message(), "broken after 5 tokens");
      EXPECT_FALSE(finish.retryable);
    }
  }
}

TEST(ConstrainTest, BansThatLeaveNothingEndTheOutput) {
  for (const bool min_tokens : {false, true}) {
    Driver driver(kOptions, Simulated(256));
    // Allowed first: multiples of 5, and the end.
    Request request = Constrained("r", {1, 2}, 10, {.may_end = 0});
    for (int32_t t = 0; t < kEos; t += 5) request.sampling.logit_bias.emplace_back(t, -100.0F);
    if (min_tokens) {
      request.sampling.min_tokens = 2;
    } else {
      request.sampling.ignore_eos = true;
    }
    ASSERT_TRUE(driver.Add(request).ok());
    driver.RunToEnd(100);
    const RecordingSink::Output output = driver.sink("r").outputs()[0];
    EXPECT_TRUE(output.tokens.empty());
    EXPECT_EQ(output.finish.reason, FinishReason::kError);
    EXPECT_EQ(output.finish.error.message(),
              "after 0 tokens, logit_bias and min_tokens ban every token that the output's form allows");
  }
}

// Masks are in the plan for the rows that need them and no others; unconstrained outputs get a token in every step.
TEST(ConstrainTest, OthersStayPipelined) {
  Driver driver(kOptions, Simulated(256));
  const Form form;
  const Request constrained = Constrained("form", {1, 2, 3}, 20, form);
  Request plain = MakeRequest("plain", {1, 2, 3, 4}, 40);
  ASSERT_TRUE(driver.Add(constrained).ok());
  ASSERT_TRUE(driver.Add(plain).ok());
  int64_t plans = 0, masked = 0;
  driver.observer = [&](const StepPlan& plan) {
    const HomePlan& home = plan.homes[0];
    ++plans;
    masked += home.num_masks();
    EXPECT_LE(home.num_masks(), 1);
    EXPECT_EQ(home.mask_words(), home.num_masks() > 0 ? 4 : 0);
  };
  driver.RunToEnd(200);
  ExpectOutputs(driver, constrained, form);
  EXPECT_EQ(masked, 20);
  EXPECT_EQ(plans, 40);
  const auto steps = driver.sink("plain").outputs()[0].steps;
  EXPECT_EQ(steps.back() - steps.front(), 39);
  const auto slower = driver.sink("form").outputs()[0].steps;
  EXPECT_EQ(slower.back() - slower.front(), 2 * 19);
}

// Few blocks, forced preemption, lost ranks, late masks, cancellation, all mixed with requests that have no form.
TEST(ConstrainTest, RandomRequestsThroughPreemptionAndLoss) {
  for (uint64_t seed = 1; seed <= 30; ++seed) {
    std::mt19937_64 random(seed);
    SchedulerOptions options = kOptions;
    if (seed % 3 == 0) options.force_preempt_every = 3;
    SimulatedOptions simulated = Simulated(40);
    simulated.num_homes = 2;
    if (seed % 2 == 0) {
      simulated.lose = [losses = 4, random](int64_t, bool) mutable -> std::optional<SimulatedLoss> {
        if (losses == 0 || random() % 20 != 0) return std::nullopt;
        --losses;
        return SimulatedLoss{.homes = random() % 2 == 0 ? std::vector<int>{1} : std::vector<int>{}};
      };
    }
    Driver driver(options, simulated);
    std::vector<std::pair<Request, Form>> added;
    int32_t preemptions = 0;
    for (int i = 0; i < 12; ++i) {
      Form form;
      if (random() % 2 == 0) form.may_end = static_cast<int32_t>(random() % 10);
      if (random() % 2 == 0) form.complete = static_cast<int32_t>(random() % 20);
      if (random() % 8 == 0) form.broken = static_cast<int32_t>(random() % 10);
      form.late = static_cast<int>(random() % 4);
      std::vector<int32_t> prompt;
      for (uint64_t n = 1 + random() % 40; n > 0; --n) prompt.push_back(static_cast<int32_t>(n % 7));
      Request request =
          Constrained(fmt::format("{}/{}", seed, i), prompt, 1 + static_cast<int32_t>(random() % 30), form);
      request.num_outputs = 1 + static_cast<int32_t>(random() % 3);
      if (random() % 3 == 0) request.sampling.num_prompt_logprobs = 2;
      ASSERT_TRUE(driver.Add(request).ok());
      added.emplace_back(request, form);
      ASSERT_TRUE(driver.Add(RandomRequest(random, fmt::format("plain {}", i), simulated.limits, 60)).ok());
      if (i % 4 == 3) {
        ASSERT_TRUE(driver.Add(Constrained(fmt::format("gone {}", i), {1, 2, 3}, 50, {.late = 2})).ok());
      }
      for (int turn = 0; turn < 5; ++turn) driver.Turn();
      if (i % 4 == 3) driver.Cancel(fmt::format("gone {}", i), -1);
    }
    driver.RunToEnd(20000);
    for (const auto& [request, form] : added) {
      ExpectOutputs(driver, request, form);
      for (const auto& output : driver.sink(request.id).outputs()) preemptions += output.finish.num_preemptions;
    }
    if (seed % 3 == 0) {
      EXPECT_GT(preemptions, 0) << seed;
    }
  }
}

// A step loop sleeps while a mask is all that it waits for, and wakes for it.
TEST(ConstrainTest, StepLoopWakesForMasks) {
  class SlowConstraint final : public TokenConstraint {
   public:
    explicit SlowConstraint(std::function<void()> ready) : ready_(std::move(ready)) { Begin(); }
    ~SlowConstraint() override { thread_.join(); }
    const NextTokens* Poll() override { return done_ ? &next_ : nullptr; }
    void Advance(int32_t token) override {
      thread_.join();
      tokens_.push_back(token);
      Begin();
    }

   private:
    void Begin() {
      done_ = false;
      thread_ = std::thread([this] {
        // What computing takes: long enough for the loop to fall asleep.
        std::this_thread::sleep_for(std::chrono::milliseconds(3));
        next_ = After({.complete = 12}, tokens_);
        done_ = true;
        ready_();
      });
    }
    const std::function<void()> ready_;
    std::vector<int32_t> tokens_;
    NextTokens next_;
    std::atomic<bool> done_ = false;
    std::thread thread_;
  };
  class SlowSource final : public ConstraintSource {
    std::unique_ptr<TokenConstraint> Start(std::function<void()> ready) const override {
      return std::make_unique<SlowConstraint>(std::move(ready));
    }
  };
  SimulatedEngine engine(Simulated(64));
  SchedulerOptions options = kOptions;
  options.check_integrity_when_idle = true;
  const auto loop = *StepLoop::Create(options, engine, Clock::Real());
  Request request = MakeRequest("slow", {1, 2, 3}, 50);
  const auto sink = std::make_shared<RecordingSink>(2);
  request.num_outputs = 2;
  request.sink = sink;
  request.constraint = std::make_shared<SlowSource>();
  ASSERT_TRUE(loop->Add(std::move(request)).ok());
  ASSERT_TRUE(loop->AwaitIdle(absl::Seconds(20)).ok());
  for (const auto& output : sink->outputs()) {
    EXPECT_EQ(output.tokens.size(), 12u);
    EXPECT_EQ(output.finish.reason, FinishReason::kStop);
  }
}

}  // namespace
}  // namespace soloist
