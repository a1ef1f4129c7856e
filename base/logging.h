// Logging set-up. Everything logs through spdlog's default logger, to stderr; lines about a request carry its id.
#ifndef SOLOIST_BASE_LOGGING_H_
#define SOLOIST_BASE_LOGGING_H_

#include <string>

#include "absl/status/status.h"
#include "spdlog/spdlog.h"

namespace soloist {

struct LogOptions {
  std::string level = "info";   // trace, debug, info, warn, error, off
  std::string format = "text";  // text: one readable line; json: one object a line {time, level, thread, message}
};

// Replaces spdlog's default logger. Call once, early, from main. INVALID_ARGUMENT names what is allowed.
absl::Status InitLogging(const LogOptions& options);

}  // namespace soloist

#endif  // SOLOIST_BASE_LOGGING_H_
