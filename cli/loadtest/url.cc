#include "cli/loadtest/url.h"

#include <algorithm>

#include "absl/strings/numbers.h"
#include "base/status.h"

namespace soloist::cli {

absl::StatusOr<Url> ParseUrl(std::string_view text) {
  constexpr std::string_view kScheme = "http://";
  const std::string whole(text);
  if (text.starts_with("https://")) return Unimplemented("'{}': no TLS here, only http://", whole);
  if (!text.starts_with(kScheme)) return InvalidArgument("'{}' is not http://HOST[:PORT][/PREFIX]", whole);
  text.remove_prefix(kScheme.size());
  Url url;
  const size_t slash = std::min(text.find('/'), text.size());
  url.prefix = text.substr(slash);
  while (url.prefix.ends_with('/')) url.prefix.pop_back();
  std::string_view authority = text.substr(0, slash);
  const size_t bracket = authority.rfind(']'), colon = authority.rfind(':');
  if (colon != std::string_view::npos && (bracket == std::string_view::npos || colon > bracket)) {
    url.port = authority.substr(colon + 1);
    authority = authority.substr(0, colon);
  }
  if (authority.starts_with('[') && authority.ends_with(']')) authority = authority.substr(1, authority.size() - 2);
  url.host = authority;
  int port = 0;
  if (url.host.empty() || !absl::SimpleAtoi(url.port, &port) || port < 1 || port > 65535) {
    return InvalidArgument("'{}' is not http://HOST[:PORT][/PREFIX]", whole);
  }
  return url;
}

}  // namespace soloist::cli
