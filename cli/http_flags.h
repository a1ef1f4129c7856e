// Flags of the HTTP port, and what they become.
#ifndef SOLOIST_CLI_HTTP_FLAGS_H_
#define SOLOIST_CLI_HTTP_FLAGS_H_

#include <memory>
#include <optional>
#include <string>

#include "CLI/CLI.hpp"
#include "absl/status/statusor.h"
#include "server/frontend.h"
#include "server/http/api.h"
#include "server/http/http_server.h"

namespace soloist::cli {

struct HttpFlags {
  std::string address;  // empty: no HTTP
  std::optional<int> port;
  std::string chat_template;
  double heartbeat_s = 5;
  double header_timeout_s = 10;
  HttpServerOptions server;
  HttpApiOptions api;

  void AddTo(CLI::App& app);
  bool enabled() const { return !address.empty() || port.has_value(); }
};

// The HTTP port with what it answers. Members in the order in which they must die last to first.
struct HttpPort {
  std::unique_ptr<HttpApi> api;
  std::unique_ptr<HttpServer> server;
};

// Both null where the flags ask for no HTTP. `grpc_address`: whose host --http-port means. `frontend` must outlive it.
absl::StatusOr<HttpPort> OpenHttpPort(const HttpFlags& flags, const std::string& model_dir,
                                      const std::string& grpc_address, Frontend& frontend);

}  // namespace soloist::cli

#endif  // SOLOIST_CLI_HTTP_FLAGS_H_
