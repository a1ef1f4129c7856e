// absl::Status conveniences: early return, and messages made with fmt.
#ifndef SOLOIST_BASE_STATUS_H_
#define SOLOIST_BASE_STATUS_H_

#include <string_view>
#include <utility>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "fmt/format.h"

// Debian's absl has a string_view of its own; this lets fmt print it (status messages).
template <>
struct fmt::formatter<absl::string_view> : fmt::formatter<std::string_view> {
  template <typename Context>
  auto format(absl::string_view text, Context& context) const {
    return fmt::formatter<std::string_view>::format(std::string_view(text.data(), text.size()), context);
  }
};

namespace soloist {

// Each makes a status of that code with an fmt-formatted message: InvalidArgument("max_tokens is {}, limit {}", n,
// max).
#define SOLOIST_STATUS_MAKER(Name)                                              \
  template <typename... Args>                                                   \
  absl::Status Name(fmt::format_string<Args...> format, Args&&... args) {       \
    return absl::Name##Error(fmt::format(format, std::forward<Args>(args)...)); \
  }
SOLOIST_STATUS_MAKER(InvalidArgument)
SOLOIST_STATUS_MAKER(NotFound)
SOLOIST_STATUS_MAKER(FailedPrecondition)
SOLOIST_STATUS_MAKER(ResourceExhausted)
SOLOIST_STATUS_MAKER(DeadlineExceeded)
SOLOIST_STATUS_MAKER(Unavailable)
SOLOIST_STATUS_MAKER(Aborted)
SOLOIST_STATUS_MAKER(Cancelled)
SOLOIST_STATUS_MAKER(Internal)
SOLOIST_STATUS_MAKER(DataLoss)
SOLOIST_STATUS_MAKER(OutOfRange)
SOLOIST_STATUS_MAKER(AlreadyExists)
SOLOIST_STATUS_MAKER(Unimplemented)
#undef SOLOIST_STATUS_MAKER

// "CONTEXT: message", same code.
inline absl::Status Annotate(const absl::Status& status, std::string_view context) {
  return status.ok() ? status : absl::Status(status.code(), fmt::format("{}: {}", context, status.message()));
}

}  // namespace soloist

#define RETURN_IF_ERROR(expr)                                         \
  do {                                                                \
    if (absl::Status status_ = (expr); !status_.ok()) return status_; \
  } while (false)

#define SOLOIST_CONCAT_INNER(a, b) a##b
#define SOLOIST_CONCAT(a, b) SOLOIST_CONCAT_INNER(a, b)
#define SOLOIST_ASSIGN_OR_RETURN(tmp, lhs, expr) \
  auto tmp = (expr);                             \
  if (!tmp.ok()) return tmp.status();            \
  lhs = std::move(tmp).value()
// ASSIGN_OR_RETURN(auto x, F()): x = F().value(), or returns F()'s status.
#define ASSIGN_OR_RETURN(lhs, expr) SOLOIST_ASSIGN_OR_RETURN(SOLOIST_CONCAT(statusor_, __LINE__), lhs, expr)

#endif  // SOLOIST_BASE_STATUS_H_
