// CHECK: for conditions that only a bug of ours can break. What the world can do (files, peers, capacity) is
// absl::Status.
#ifndef SOLOIST_BASE_CHECK_H_
#define SOLOIST_BASE_CHECK_H_

#include <string>

#include "absl/status/status.h"

namespace soloist {

// Prints "FILE:LINE: CHECK failed: EXPR MESSAGE" to stderr and aborts.
[[noreturn]] void CheckFailed(const char* file, int line, const char* expr, const std::string& message);

template <typename A, typename B>
[[noreturn]] void CheckOpFailed(const char* file, int line, const char* expr, const A& a, const B& b) {
  CheckFailed(file, line, expr, "(" + std::to_string(a) + " vs " + std::to_string(b) + ")");
}

}  // namespace soloist

#define CHECK(cond) ((cond) ? static_cast<void>(0) : ::soloist::CheckFailed(__FILE__, __LINE__, #cond, std::string()))
#define CHECK_MSG(cond, message) \
  ((cond) ? static_cast<void>(0) : ::soloist::CheckFailed(__FILE__, __LINE__, #cond, (message)))
#define SOLOIST_CHECK_OP(a, b, op)                                                                                \
  do {                                                                                                            \
    const auto check_a = (a);                                                                                     \
    const auto check_b = (b);                                                                                     \
    if (!(check_a op check_b)) ::soloist::CheckOpFailed(__FILE__, __LINE__, #a " " #op " " #b, check_a, check_b); \
  } while (false)
#define CHECK_EQ(a, b) SOLOIST_CHECK_OP(a, b, ==)
#define CHECK_NE(a, b) SOLOIST_CHECK_OP(a, b, !=)
#define CHECK_LE(a, b) SOLOIST_CHECK_OP(a, b, <=)
#define CHECK_LT(a, b) SOLOIST_CHECK_OP(a, b, <)
#define CHECK_GE(a, b) SOLOIST_CHECK_OP(a, b, >=)
#define CHECK_GT(a, b) SOLOIST_CHECK_OP(a, b, >)
// For a Status that can only be bad through a bug of ours.
#define CHECK_OK(expr)                                                                                  \
  do {                                                                                                  \
    const absl::Status& check_status = (expr);                                                          \
    if (!check_status.ok()) ::soloist::CheckFailed(__FILE__, __LINE__, #expr, check_status.ToString()); \
  } while (false)

#endif  // SOLOIST_BASE_CHECK_H_
