#include "server/grammar/grammar_constraint.h"

#include <algorithm>
#include <exception>
#include <mutex>
#include <optional>
#include <utility>

#include "base/check.h"
#include "base/clock.h"
#include "base/status.h"
#include "xgrammar/matcher.h"

namespace soloist {
namespace {

// One output's matcher. At most one job works on it at a time; Poll looks at `next` after the job has set `done`.
class MatcherState {
 public:
  MatcherState(std::shared_ptr<GrammarModel> model, const xgrammar::CompiledGrammar& grammar,
               std::function<void()> ready)
      : model_(std::move(model)), grammar_(grammar), ready_(std::move(ready)) {
    next_.mask.resize(model_->eos_mask.size());
  }

  const NextTokens* Poll() const { return done_.load(std::memory_order_acquire) ? &next_ : nullptr; }

  // Before the job that computes anew is posted.
  void Begin() { done_.store(false, std::memory_order_relaxed); }

  // The job. `token`: the output's next; none before the first.
  void Compute(std::optional<int32_t> token) {
    const int64_t start_ns = Clock::Real().NowNs();
    try {
      next_.status = Step(token);
    } catch (const std::exception& error) {
      next_.status = Internal("the output's form could not be followed: {}", error.what());
    }
    Count(Clock::Real().NowNs() - start_ns);
    done_.store(true, std::memory_order_release);
    const std::lock_guard lock(mutex_);
    if (ready_) ready_();
  }

  // Nobody wants to know any more.
  void Abandon() {
    const std::lock_guard lock(mutex_);
    ready_ = nullptr;
  }

 private:
  absl::Status Step(std::optional<int32_t> token) {
    if (!matcher_.has_value()) matcher_.emplace(grammar_);
    if (token.has_value() && !matcher_->AcceptToken(*token)) {
      return Internal("token {} does not continue the output's form, though its mask allowed it", *token);
    }
    if (matcher_->IsTerminated()) {
      next_.complete = true;
      return absl::OkStatus();
    }
    std::vector<int32_t>& mask = next_.mask;
    int64_t shape = std::ssize(mask);
    DLTensor tensor{.data = mask.data(),
                    .device = {.device_type = kDLCPU, .device_id = 0},
                    .ndim = 1,
                    .dtype = xgrammar::GetBitmaskDLType(),
                    .shape = &shape,
                    .strides = nullptr,
                    .byte_offset = 0};
    matcher_->FillNextTokenBitmask(&tensor);
    if (const int32_t rest = model_->vocab_size % 32; rest != 0) {
      mask.back() = static_cast<int32_t>(static_cast<uint32_t>(mask.back()) & ((1u << rest) - 1));
    }
    bool more = false;
    for (size_t i = 0; i < mask.size() && !more; ++i) more = (mask[i] & ~model_->eos_mask[i]) != 0;
    next_.complete = !more && matcher_->IsCompleted();
    if (more || next_.complete) return absl::OkStatus();
    return InvalidArgument("no token of the vocabulary continues the output's form");
  }

  void Count(int64_t ns) {
    GrammarCounters& counters = model_->counters;
    counters.masks += 1;
    counters.mask_ns += ns;
    int64_t slowest = counters.slowest_mask_ns;
    while (slowest < ns && !counters.slowest_mask_ns.compare_exchange_weak(slowest, ns)) {
    }
  }

  const std::shared_ptr<GrammarModel> model_;
  const xgrammar::CompiledGrammar grammar_;
  std::optional<xgrammar::GrammarMatcher> matcher_;
  NextTokens next_;
  std::atomic<bool> done_ = false;
  std::mutex mutex_;
  std::function<void()> ready_;  // mutex_
};

class GrammarConstraint final : public TokenConstraint {
 public:
  GrammarConstraint(PostJob post, std::shared_ptr<MatcherState> state)
      : post_(std::move(post)), state_(std::move(state)) {
    post_([state = state_] { state->Compute(std::nullopt); });
  }
  ~GrammarConstraint() override { state_->Abandon(); }

  const NextTokens* Poll() override { return state_->Poll(); }
  void Advance(int32_t token) override {
    CHECK(state_->Poll() != nullptr);
    state_->Begin();
    post_([state = state_, token] { state->Compute(token); });
  }

 private:
  // Jobs have only the state: whatever `post_` owns must not end on one of its own threads.
  const PostJob post_;
  const std::shared_ptr<MatcherState> state_;
};

}  // namespace

std::unique_ptr<TokenConstraint> GrammarSource::Start(std::function<void()> ready) const {
  return std::make_unique<GrammarConstraint>(post_, std::make_shared<MatcherState>(model_, grammar_, std::move(ready)));
}

}  // namespace soloist
