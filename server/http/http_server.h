// HttpServer: an HTTP/1.1 listener with threads of its own. Knows sockets, framing and limits; what is asked and
// answered is the handler's.
#ifndef SOLOIST_SERVER_HTTP_HTTP_SERVER_H_
#define SOLOIST_SERVER_HTTP_HTTP_SERVER_H_

#include <cstdint>
#include <functional>
#include <memory>
#include <string>

#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "server/http/exchange.h"

namespace soloist {

struct HttpServerOptions {
  int num_threads = 2;
  int32_t max_connections = 4096;       // more are answered 503 and closed
  int64_t max_header_bytes = 32 << 10;  // request line and header fields: 431
  int64_t max_body_bytes = 8 << 20;     // 413
  int64_t max_held_bytes = 512 << 20;   // bodies of all requests that come or are handled: 503
  // From a request's first byte (a connection's opening for the first) to the end of its header, and from there to the
  // end of its body: 408.
  absl::Duration header_timeout = absl::Seconds(10);
  absl::Duration body_timeout = absl::Seconds(60);
  // A connection on which nothing is asked is closed.
  absl::Duration idle_timeout = absl::Seconds(75);
  // For a client to take the rest of a complete answer.
  absl::Duration write_timeout = absl::Seconds(60);
};

// All methods are for any thread.
class HttpServer {
 public:
  using Handler = std::function<void(std::shared_ptr<HttpExchange>)>;
  // Answers to requests that are no HTTP, or beyond the limits: an error of this status with a message.
  using ErrorMaker = std::function<HttpResponse(int status, const std::string& message)>;

  // Listens at HOST:PORT (port 0: one that is free). `handler` is called from the server's threads, once for each
  // request, one request of a connection at a time. INVALID_ARGUMENT: no address; UNAVAILABLE: it cannot be used.
  static absl::StatusOr<std::unique_ptr<HttpServer>> Create(const std::string& address,
                                                            const HttpServerOptions& options, Handler handler,
                                                            ErrorMaker error_maker);
  // Shutdown(0).
  virtual ~HttpServer() = default;

  // HOST:PORT with the port in use.
  virtual const std::string& address() const = 0;
  virtual int32_t connections() const = 0;
  // Accepts no more connections, closes those on which nothing is asked; those that are open after `grace` are reset.
  // Returns when the last has been let go of by whoever serves it.
  virtual void Shutdown(absl::Duration grace) = 0;
};

}  // namespace soloist

#endif  // SOLOIST_SERVER_HTTP_HTTP_SERVER_H_
