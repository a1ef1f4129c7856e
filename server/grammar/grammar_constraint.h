// GrammarConstraint: a TokenConstraint by a compiled grammar. Masks are computed by jobs on the threads of `post`.
#ifndef SOLOIST_SERVER_GRAMMAR_GRAMMAR_CONSTRAINT_H_
#define SOLOIST_SERVER_GRAMMAR_GRAMMAR_CONSTRAINT_H_

#include <atomic>
#include <cstdint>
#include <functional>
#include <memory>
#include <vector>

#include "scheduler/token_constraint.h"
#include "server/grammar/grammar_compiler.h"
#include "xgrammar/compiler.h"

namespace soloist {

// Written by the threads that compile and compute masks.
struct GrammarCounters {
  std::atomic<int64_t> compiled = 0, compile_ns = 0, cache_hits = 0, masks = 0, mask_ns = 0, slowest_mask_ns = 0;
};

// What all constraints of one model share. Immutable but for the counters.
struct GrammarModel {
  int32_t vocab_size = 0;
  std::vector<int32_t> eos_mask;  // [TokenMaskWords(vocab_size)] the end tokens
  GrammarCounters counters;
};

class GrammarSource final : public ConstraintSource {
 public:
  GrammarSource(std::shared_ptr<GrammarModel> model, PostJob post, xgrammar::CompiledGrammar grammar)
      : model_(std::move(model)), post_(std::move(post)), grammar_(std::move(grammar)) {}
  std::unique_ptr<TokenConstraint> Start(std::function<void()> ready) const override;

  int64_t memory_bytes() const { return static_cast<int64_t>(grammar_.MemorySizeBytes()); }

 private:
  const std::shared_ptr<GrammarModel> model_;
  const PostJob post_;
  const xgrammar::CompiledGrammar grammar_;
};

}  // namespace soloist

#endif  // SOLOIST_SERVER_GRAMMAR_GRAMMAR_CONSTRAINT_H_
