// The load tester's client for OpenAI's HTTP interface, as any server speaks it: streamed completions and chat
// completions. Plain HTTP/1.1, one request per connection at a time, connections kept alive.
#ifndef SOLOIST_CLI_LOADTEST_HTTP_CLIENT_H_
#define SOLOIST_CLI_LOADTEST_HTTP_CLIENT_H_

#include <memory>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "cli/loadtest/load_client.h"

namespace soloist::cli {

struct HttpClientOptions {
  std::string url;                   // http://HOST[:PORT][/PREFIX]
  bool chat = false;                 // /v1/chat/completions instead of /v1/completions
  std::string model;                 // empty: the first that /v1/models lists
  int threads = 1;                   // that read and write
  int connections = 0;               // opened ahead; more are opened when all are in use
  std::string extra_body;            // a JSON object merged into each request (RFC 7396: null takes a field out)
  std::vector<std::string> headers;  // "Name: value", with each request
};

// Completions take token ids as they are planned. Chat completions take text: token ids become as many short words, and
// the server's own count of them is what the record has.
class HttpLoadClient : public LoadClient {
 public:
  // Asks for the model (and, where it says so, the version); fails within 10 s if nobody answers.
  static absl::StatusOr<std::unique_ptr<HttpLoadClient>> Connect(const HttpClientOptions& options);
};

}  // namespace soloist::cli

#endif  // SOLOIST_CLI_LOADTEST_HTTP_CLIENT_H_
