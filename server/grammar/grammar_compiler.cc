#include "server/grammar/grammar_compiler.h"

#include <algorithm>
#include <condition_variable>
#include <exception>
#include <list>
#include <mutex>
#include <optional>
#include <string_view>
#include <thread>
#include <unordered_map>
#include <utility>

#include "base/clock.h"
#include "base/status.h"
#include "engine/step.h"
#include "server/grammar/grammar_checks.h"
#include "server/grammar/grammar_constraint.h"
#include "server/grammar/grammar_log.h"
#include "xgrammar/grammar.h"

namespace soloist {
namespace {

// White space between two tokens of JSON: enough for indented text, too little to fill an output with.
constexpr int kMaxWhitespace = 16;
// That one form is compiled on.
constexpr int kThreadsPerForm = 2;

using SourcePtr = std::shared_ptr<const GrammarSource>;

std::string KeyOf(const OutputForm& form) {
  std::string key = OutputFormName(form.kind);
  key += '\0';
  if (form.kind != OutputForm::Kind::kChoice) return key + form.text;
  for (const std::string& choice : form.choices) key += fmt::format("{}:{}", choice.size(), choice);
  return key;
}

xgrammar::Grammar Parse(const OutputForm& form) {
  const auto schema = [](const std::string& text) {
    return xgrammar::Grammar::FromJSONSchema(text, /*any_whitespace=*/true, /*indent=*/std::nullopt,
                                             /*separators=*/std::nullopt, /*strict_mode=*/true, kMaxWhitespace);
  };
  switch (form.kind) {
    case OutputForm::Kind::kJsonObject:
      return schema(R"({"type": "object", "additionalProperties": true})");
    case OutputForm::Kind::kJsonSchema:
      return schema(form.text);
    case OutputForm::Kind::kRegex:
      return xgrammar::Grammar::FromRegex(form.text);
    case OutputForm::Kind::kChoice:
      return xgrammar::Grammar::FromEBNF(ChoiceGrammar(form.choices));
    case OutputForm::Kind::kGrammar:
    case OutputForm::Kind::kNone:  // CheckOutputForm refuses it
      break;
  }
  return xgrammar::Grammar::FromEBNF(form.text);
}

// xgrammar's words, without its source code, on one line and of bounded length.
std::string OneLine(std::string text) {
  constexpr size_t kMaxMessage = 500;
  constexpr std::string_view kCheck = "Check failed: (", kFalse = ") is false: ";
  if (const size_t end = text.find(kFalse); text.starts_with(kCheck) && end != std::string::npos) {
    text.erase(0, end + kFalse.size());
  }
  std::ranges::replace(text, '\n', ' ');
  while (!text.empty() && text.back() == ' ') text.pop_back();
  if (text.size() > kMaxMessage) text = text.substr(0, kMaxMessage) + " ...";
  return text;
}

// The latest forms, up to a number of bytes. Thread-safe.
class SourceCache {
 public:
  explicit SourceCache(int64_t max_bytes) : max_bytes_(max_bytes) {}

  SourcePtr Find(const std::string& key) {
    const std::lock_guard lock(mutex_);
    const auto it = entries_.find(key);
    if (it == entries_.end()) return nullptr;
    order_.splice(order_.begin(), order_, it->second);
    return it->second->source;
  }

  void Insert(const std::string& key, SourcePtr source) {
    const int64_t bytes = source->memory_bytes() + std::ssize(key);
    const std::lock_guard lock(mutex_);
    order_.push_front({key, std::move(source), bytes});
    entries_[key] = order_.begin();
    bytes_ += bytes;
    while (bytes_ > max_bytes_) {
      bytes_ -= order_.back().bytes;
      entries_.erase(order_.back().key);
      order_.pop_back();
    }
  }

  int64_t bytes() const {
    const std::lock_guard lock(mutex_);
    return bytes_;
  }

 private:
  struct Entry {
    std::string key;
    SourcePtr source;
    int64_t bytes = 0;
  };
  const int64_t max_bytes_;
  mutable std::mutex mutex_;
  std::list<Entry> order_;                                               // mutex_; the latest first
  std::unordered_map<std::string, std::list<Entry>::iterator> entries_;  // mutex_
  int64_t bytes_ = 0;                                                    // mutex_
};

class XgrammarCompiler final : public GrammarCompiler {
 public:
  XgrammarCompiler(const xgrammar::TokenizerInfo& tokens, std::shared_ptr<GrammarModel> model,
                   const GrammarOptions& options, PostJob post_mask)
      : options_(options),
        tokens_(tokens),
        model_(std::move(model)),
        post_mask_(std::move(post_mask)),
        cache_(options.max_cache_bytes) {}

  ~XgrammarCompiler() override {
    std::unique_lock lock(mutex_);
    ended_.wait(lock, [this] { return compiling_.empty(); });
  }

  std::shared_ptr<const ConstraintSource> Find(const OutputForm& form) override { return cache_.Find(KeyOf(form)); }

  absl::StatusOr<std::shared_ptr<const ConstraintSource>> Compile(const OutputForm& form) override {
    RETURN_IF_ERROR(CheckOutputForm(form, options_.limits));
    const std::string key = KeyOf(form);
    std::unique_lock lock(mutex_);
    if (SourcePtr found = cache_.Find(key); found != nullptr) {
      model_->counters.cache_hits += 1;
      return found;
    }
    std::shared_ptr<Job>& known = compiling_[key];
    if (known == nullptr) {
      if (std::ssize(compiling_) > options_.max_compiling) {
        compiling_.erase(key);
        return ResourceExhausted("{} forms of outputs are being compiled, the limit is {}: try again later",
                                 options_.max_compiling, options_.max_compiling);
      }
      known = std::make_shared<Job>();
      // A thread of its own, since nothing can stop xgrammar. The destructor waits for it.
      std::thread([this, form, key, job = known]() mutable {
        absl::StatusOr<SourcePtr> result = CompileNow(form);
        const std::lock_guard done(mutex_);
        if (result.ok()) cache_.Insert(key, *result);
        job->result = std::move(result);
        compiling_.erase(key);
        job.reset();  // the callers' now
        ended_.notify_all();
      }).detach();
    }
    const std::shared_ptr<Job> job = known;
    if (!ended_.wait_for(lock, absl::ToChronoNanoseconds(options_.max_compile_time),
                         [&job] { return job->result.has_value(); })) {
      return InvalidArgument("{}: compiling it takes longer than {}", OutputFormName(form.kind),
                             absl::FormatDuration(options_.max_compile_time));
    }
    RETURN_IF_ERROR(job->result->status());
    return **job->result;
  }

  GrammarStats stats() const override {
    const GrammarCounters& c = model_->counters;
    return {.compiled = c.compiled,
            .compile_ns = c.compile_ns,
            .cache_hits = c.cache_hits,
            .cached_bytes = cache_.bytes(),
            .masks = c.masks,
            .mask_ns = c.mask_ns,
            .slowest_mask_ns = c.slowest_mask_ns};
  }

 private:
  struct Job {
    std::optional<absl::StatusOr<SourcePtr>> result;  // mutex_
  };

  absl::StatusOr<SourcePtr> CompileNow(const OutputForm& form) const {
    const int64_t start_ns = Clock::Real().NowNs();
    const char* name = OutputFormName(form.kind);
    if (form.kind == OutputForm::Kind::kJsonSchema) RETURN_IF_ERROR(CheckSchemaKeywords(form.text));
    try {
      std::optional<xgrammar::Grammar> grammar;
      {
        const GrammarWarning warning;
        grammar = Parse(form);
        if (!warning.text().empty()) return InvalidArgument("{}: {}", name, OneLine(warning.text()));
      }
      xgrammar::GrammarCompiler compiler(tokens_, kThreadsPerForm, /*cache_enabled=*/false);
      auto source = std::make_shared<const GrammarSource>(model_, post_mask_, compiler.CompileGrammar(*grammar));
      model_->counters.compiled += 1;
      model_->counters.compile_ns += Clock::Real().NowNs() - start_ns;
      return source;
    } catch (const std::exception& error) {
      return InvalidArgument("{}: {}", name, OneLine(error.what()));
    }
  }

  const GrammarOptions options_;
  const xgrammar::TokenizerInfo tokens_;
  const std::shared_ptr<GrammarModel> model_;
  const PostJob post_mask_;
  SourceCache cache_;
  std::mutex mutex_;
  std::condition_variable ended_;
  std::unordered_map<std::string, std::shared_ptr<Job>> compiling_;  // mutex_; by key
};

}  // namespace

std::unique_ptr<GrammarCompiler> GrammarCompiler::Create(const Tokenizer& tokenizer, int32_t vocab_size,
                                                         std::span<const int32_t> eos_token_ids,
                                                         const GrammarOptions& options, PostJob post_mask) {
  auto model = std::make_shared<GrammarModel>();
  model->vocab_size = vocab_size;
  model->eos_mask.assign(TokenMaskWords(vocab_size), 0);
  std::vector<int32_t> stops;
  for (const int32_t token : eos_token_ids) {
    if (token < 0 || token >= vocab_size) continue;
    stops.push_back(token);
    model->eos_mask[token / 32] |= static_cast<int32_t>(1u << (token % 32));
  }
  // xgrammar takes an empty string for a special token.
  std::vector<std::string> vocabulary(vocab_size);
  for (int32_t id = 0; id < std::min(vocab_size, tokenizer.vocab_size()); ++id) {
    if (!tokenizer.IsSpecial(id)) vocabulary[id] = std::string(tokenizer.TokenBytes(id));
  }
  const xgrammar::TokenizerInfo tokens(vocabulary, xgrammar::VocabType::RAW, vocab_size, stops);
  return std::make_unique<XgrammarCompiler>(tokens, std::move(model), options, std::move(post_mask));
}

}  // namespace soloist
