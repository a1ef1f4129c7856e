// Addresses of HTTP servers.
#ifndef SOLOIST_CLI_LOADTEST_URL_H_
#define SOLOIST_CLI_LOADTEST_URL_H_

#include <string>
#include <string_view>

#include "absl/status/statusor.h"

namespace soloist::cli {

struct Url {
  std::string host, port = "80", prefix;
};

// "http://HOST[:PORT][/PREFIX]"; an IPv6 host stands in brackets, and is without them in Url. The prefix has no slash
// at its end. Unimplemented for https.
absl::StatusOr<Url> ParseUrl(std::string_view text);

}  // namespace soloist::cli

#endif  // SOLOIST_CLI_LOADTEST_URL_H_
