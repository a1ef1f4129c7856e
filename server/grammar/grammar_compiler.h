// GrammarCompiler: from an OutputForm to the scheduler's ConstraintSource. Compiled forms are kept, so that the second
// request with the same schema costs a look-up.
#ifndef SOLOIST_SERVER_GRAMMAR_GRAMMAR_COMPILER_H_
#define SOLOIST_SERVER_GRAMMAR_GRAMMAR_COMPILER_H_

#include <cstdint>
#include <functional>
#include <memory>
#include <span>
#include <string>

#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "scheduler/token_constraint.h"
#include "server/grammar/output_form.h"
#include "server/tokenizer/tokenizer.h"

namespace soloist {

struct GrammarOptions {
  OutputFormLimits limits;
  int64_t max_cache_bytes = 256 << 20;  // of compiled forms, as xgrammar counts them
  // How long a caller waits for a form to be compiled. What takes longer is refused; its thread goes on to the end,
  // which the limits bound.
  absl::Duration max_compile_time = absl::Seconds(5);
  int max_compiling = 2;  // forms at a time
};

// Runs a job soon, on a thread of its own choice. What it owns may be used after the compiler is gone.
using PostJob = std::function<void(std::function<void()>)>;

struct GrammarStats {
  int64_t compiled = 0;      // forms
  int64_t compile_ns = 0;    // of them together
  int64_t cache_hits = 0;    // requests whose form was there
  int64_t cached_bytes = 0;  // of the forms that are kept
  int64_t masks = 0;         // computed
  int64_t mask_ns = 0;       // of them together: taking the token and filling the mask
  int64_t slowest_mask_ns = 0;
};

// Thread-safe. Its constraints may outlive it.
class GrammarCompiler {
 public:
  // `vocab_size`: of the model; a token that the tokenizer does not have, and a special one, is never allowed.
  // `post_mask`: for the jobs that compute masks (microseconds each, as a rule).
  static std::unique_ptr<GrammarCompiler> Create(const Tokenizer& tokenizer, int32_t vocab_size,
                                                 std::span<const int32_t> eos_token_ids, const GrammarOptions& options,
                                                 PostJob post_mask);
  virtual ~GrammarCompiler() = default;

  // What was compiled before and is kept; else null. Quick.
  virtual std::shared_ptr<const ConstraintSource> Find(const OutputForm& form) = 0;
  // Blocks while the form is compiled (milliseconds as a rule): not for the step loop's thread, nor a connection's.
  // INVALID_ARGUMENT says what is wrong with the form; RESOURCE_EXHAUSTED if too many forms are being compiled.
  virtual absl::StatusOr<std::shared_ptr<const ConstraintSource>> Compile(const OutputForm& form) = 0;

  virtual GrammarStats stats() const = 0;
};

}  // namespace soloist

#endif  // SOLOIST_SERVER_GRAMMAR_GRAMMAR_COMPILER_H_
