#include "server/output_stream.h"

#include <algorithm>
#include <utility>

#include "base/status.h"

namespace soloist {
namespace {

// Of one log-probability in a message, with its token's bytes: about.
constexpr int64_t kLogprobBytes = 32;

int64_t PromptBytes(const PromptLogprobs& scores) {
  return int64_t{scores.size()} * (1 + scores.num_top) * static_cast<int64_t>(sizeof(int32_t) + sizeof(float));
}

}  // namespace

OutputStream::OutputStream(OutputStreamOptions options, const Tokenizer& tokenizer, const Clock& clock,
                           std::function<void()> on_ready, std::function<void(int32_t)> cancel_output)
    : options_(std::move(options)),
      tokenizer_(tokenizer),
      clock_(clock),
      stops_(options_.stop_strings),
      on_ready_(std::move(on_ready)),
      cancel_output_(std::move(cancel_output)),
      arrived_(options_.num_outputs) {
  outputs_.reserve(options_.num_outputs);
  for (int32_t i = 0; i < options_.num_outputs; ++i) {
    outputs_.emplace_back(tokenizer_, stops_, options_);
    outputs_.back().delta.output_index = i;
    outputs_.back().end.output_index = i;
  }
  end_.prompt_tokens = options_.prompt_tokens;
}

int64_t OutputStream::BytesOf(const TokenEvent& event) const {
  return static_cast<int64_t>(sizeof(TokenEvent) + event.top_logprobs.size() * sizeof(event.top_logprobs[0]) +
                              event.logits.size() * sizeof(float) + tokenizer_.TokenBytes(event.token).size());
}

void OutputStream::Count(const TokenEvent& event) {
  Arrived& arrived = arrived_[event.output_index];
  if (options_.metrics != nullptr) {
    if (arrived.tokens == 0) {
      options_.metrics->FirstToken(event.time_ns - options_.received_ns);
    } else {
      options_.metrics->NextToken(event.time_ns - arrived.last_ns);
    }
  }
  ++arrived.tokens;
  arrived.last_ns = event.time_ns;
}

bool OutputStream::OnToken(TokenEvent event) {
  Count(event);
  const int64_t bytes = BytesOf(event);
  // At least one token always fits.
  const int64_t tokens_before = buffered_tokens_.fetch_add(1);
  const int64_t bytes_before = buffered_bytes_.fetch_add(bytes);
  if (overflowed_ || tokens_before >= options_.max_buffered_tokens ||
      (tokens_before > 0 && bytes_before + bytes > options_.max_buffered_bytes)) {
    buffered_tokens_ -= 1;
    buffered_bytes_ -= bytes;
    overflowed_ = true;
    return false;
  }
  Arrive(std::move(event));
  return true;
}

bool OutputStream::OnPromptLogprobs(const PromptLogprobs& event) {
  const int64_t bytes = PromptBytes(event);
  const int64_t bytes_before = buffered_bytes_.fetch_add(bytes);
  if (overflowed_ || (bytes_before > 0 && bytes_before + bytes > options_.max_buffered_bytes)) {
    buffered_bytes_ -= bytes;
    overflowed_ = true;
    return false;
  }
  Arrive(event);
  return true;
}

void OutputStream::OnFinish(const FinishEvent& event) {
  if (options_.metrics != nullptr) {
    options_.metrics->Ended(event, options_.received_ns, options_.prompt_tokens, arrived_[event.output_index].tokens);
  }
  Arrive(event);
}

void OutputStream::Arrive(Arrival arrival) {
  bool was_empty;
  {
    const std::lock_guard lock(mutex_);
    was_empty = inbox_.empty();
    inbox_.push_back(std::move(arrival));
  }
  if (was_empty) on_ready_();
}

void OutputStream::Process() {
  taken_.clear();
  {
    const std::lock_guard lock(mutex_);
    taken_.swap(inbox_);
  }
  for (auto& item : taken_) {
    if (auto* token = std::get_if<TokenEvent>(&item)) {
      ProcessToken(std::move(*token));
    } else if (const auto* scores = std::get_if<PromptLogprobs>(&item)) {
      ProcessPrompt(*scores);
    } else {
      ProcessFinish(std::get<FinishEvent>(item));
    }
  }
}

void OutputStream::ProcessPrompt(const PromptLogprobs& all) {
  const int64_t fit = options_.max_delta_bytes / ((1 + all.num_top) * kLogprobBytes);
  const auto most = static_cast<int32_t>(std::clamp<int64_t>(fit, 1, all.size()));
  for (int32_t begin = 0; begin < all.size(); begin += most) {
    const int32_t count = std::min(most, all.size() - begin);
    const auto part = [begin, count](const auto& from, int32_t width) {
      const auto first = from.begin() + static_cast<std::ptrdiff_t>(begin) * width;
      return std::vector(first, first + static_cast<std::ptrdiff_t>(count) * width);
    };
    prompt_.push_back({.first = all.first + begin,
                       .num_top = all.num_top,
                       .tokens = part(all.tokens, 1),
                       .logprobs = part(all.logprobs, 1),
                       .top_tokens = part(all.top_tokens, all.num_top),
                       .top_logprobs = part(all.top_logprobs, all.num_top)});
  }
}

void OutputStream::ProcessToken(TokenEvent event) {
  Output& out = outputs_[event.output_index];
  const int64_t bytes = BytesOf(event);
  if (out.stopped) {  // computed while the stop string was being found
    buffered_tokens_ -= 1;
    buffered_bytes_ -= bytes;
    return;
  }
  out.tokens += 1;
  // A stop token ends the text before itself; the loop's OnFinish follows.
  if (options_.include_stop || !options_.stop_tokens.contains(event.token)) {
    out.delta.text += out.matcher.Push(out.decoder.Push(event.token));
  }
  out.delta.tokens.push_back(std::move(event));
  if (out.matcher.matched() < 0) return;
  out.stopped = true;
  out.end.times.last_token_ns = clock_.NowNs();
  cancel_output_(out.end.output_index);
}

void OutputStream::ProcessFinish(const FinishEvent& event) {
  Output& out = outputs_[event.output_index];
  const int64_t stopped_ns = out.end.times.last_token_ns;
  out.finished = true;
  out.end.reason = event.reason;
  out.end.times = event.times;
  out.end.error = event.error;
  out.end.retryable = event.retryable;
  out.end.output_tokens = out.tokens;
  if (event.stop_token >= 0) out.end.stop_token = event.stop_token;
  if (!out.stopped) {
    out.delta.text += out.matcher.Push(out.decoder.Flush());
    out.delta.text += out.matcher.Flush();
  } else {
    // Tokens after the one that completed the stop string were computed in vain and are not reported.
    out.end.times.last_token_ns = std::min(stopped_ns, event.times.last_token_ns);
  }
  if (out.matcher.matched() >= 0) {
    out.end.reason = FinishReason::kStop;
    out.end.stop_string = stops_.strings()[out.matcher.matched()];
    out.end.stop_token.reset();
    out.end.error = absl::OkStatus();
  } else if (overflowed_ && event.reason == FinishReason::kCancelled) {
    out.end.reason = FinishReason::kError;
    out.end.error = ResourceExhausted("the reader is too slow: more than {} tokens or {} bytes unread",
                                      options_.max_buffered_tokens, options_.max_buffered_bytes);
    out.end.retryable = true;
  }
  end_.output_tokens += out.tokens;
  end_.cached_prompt_tokens = std::max(end_.cached_prompt_tokens, event.cached_prompt_tokens);
  end_.preemptions += event.num_preemptions;
  const auto earliest = [](int64_t a, int64_t b) { return a == 0 ? b : b == 0 ? a : std::min(a, b); };
  end_.times.arrival_ns = earliest(end_.times.arrival_ns, out.end.times.arrival_ns);
  end_.times.first_scheduled_ns = earliest(end_.times.first_scheduled_ns, out.end.times.first_scheduled_ns);
  end_.times.first_token_ns = earliest(end_.times.first_token_ns, out.end.times.first_token_ns);
  end_.times.last_token_ns = std::max(end_.times.last_token_ns, out.end.times.last_token_ns);
}

std::vector<OutputEnd> OutputStream::ends() const {
  std::vector<OutputEnd> ends;
  ends.reserve(outputs_.size());
  for (const Output& out : outputs_) {
    ends.push_back(out.end);
    ends.back().output_tokens = out.tokens;
  }
  return ends;
}

std::optional<StreamEvent> OutputStream::Next() {
  if (!prompt_.empty()) {
    PromptLogprobs part = std::move(prompt_.front());
    prompt_.pop_front();
    buffered_bytes_ -= PromptBytes(part);
    return part;
  }
  for (size_t i = 0; i < outputs_.size(); ++i) {
    Output& out = outputs_[turn_ % outputs_.size()];
    ++turn_;
    if (!out.delta.tokens.empty() || !out.delta.text.empty()) {
      Delta delta{.output_index = out.delta.output_index, .text = std::move(out.delta.text), .tokens = {}};
      out.delta.text.clear();
      int64_t bytes = static_cast<int64_t>(delta.text.size());
      size_t count = 0;
      int64_t token_bytes = 0;
      while (count < out.delta.tokens.size() && (count == 0 || bytes < options_.max_delta_bytes)) {
        const int64_t b = BytesOf(out.delta.tokens[count]);
        bytes += b;
        token_bytes += b;
        ++count;
      }
      const auto cut = out.delta.tokens.begin() + static_cast<std::ptrdiff_t>(count);
      delta.tokens.assign(std::move_iterator(out.delta.tokens.begin()), std::move_iterator(cut));
      out.delta.tokens.erase(out.delta.tokens.begin(), cut);
      buffered_tokens_ -= static_cast<int64_t>(count);
      buffered_bytes_ -= token_bytes;
      return delta;
    }
    if (out.finished && !out.end_taken) {
      out.end_taken = true;
      ++ends_taken_;
      return out.end;
    }
  }
  if (ends_taken_ == static_cast<int32_t>(outputs_.size()) && !end_taken_) {
    end_taken_ = true;
    return end_;
  }
  return std::nullopt;
}

}  // namespace soloist
