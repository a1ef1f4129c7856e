// TokenConstraint: which tokens an output may have next, for outputs that must have a form (a JSON schema, a regular
// expression). The scheduler neither knows the form nor waits for it: it asks what may come next, and plans the
// output's next row once that is known.
#ifndef SOLOIST_SCHEDULER_TOKEN_CONSTRAINT_H_
#define SOLOIST_SCHEDULER_TOKEN_CONSTRAINT_H_

#include <cstdint>
#include <functional>
#include <memory>
#include <vector>

#include "absl/status/status.h"

namespace soloist {

// What may follow the tokens of an output so far.
struct NextTokens {
  absl::Status status;        // not OK: the output ends with it
  bool complete = false;      // nothing but the end can follow: the output ends here
  std::vector<int32_t> mask;  // else [TokenMaskWords(vocab)]: the tokens that may follow, end tokens included where the
                              // output may end
};

// Of one output. One thread at a time (the step loop's); no call blocks or computes.
class TokenConstraint {
 public:
  virtual ~TokenConstraint() = default;
  // Null while it is being computed elsewhere. Else it stays until Advance.
  virtual const NextTokens* Poll() = 0;
  // Poll has given a mask, and `token`, which it allows, is the output's next. Starts computing what may follow.
  virtual void Advance(int32_t token) = 0;
};

// Of a request: makes one constraint for each of its outputs. Immutable.
class ConstraintSource {
 public:
  virtual ~ConstraintSource() = default;
  // Starts computing what may come first. `ready` is called, on any thread, when Poll is no longer null; not after the
  // constraint's destructor has returned.
  virtual std::unique_ptr<TokenConstraint> Start(std::function<void()> ready) const = 0;
};

}  // namespace soloist

#endif  // SOLOIST_SCHEDULER_TOKEN_CONSTRAINT_H_
