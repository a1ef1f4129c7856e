// HttpExchange: one HTTP request and its answer, as routes see them: no socket, no Beast.
#ifndef SOLOIST_SERVER_HTTP_EXCHANGE_H_
#define SOLOIST_SERVER_HTTP_EXCHANGE_H_

#include <functional>
#include <memory>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "absl/time/time.h"

namespace soloist {

// Header fields that no route asks for are not kept.
struct HttpRequest {
  std::string method;  // "GET"
  std::string path;    // "/v1/models", without the query, as it was sent
  std::string body;
  std::string content_type;
  std::string trace_parent;  // "traceparent"
  std::string request_id;    // "X-Request-Id"; empty: none, or one that a header could not carry back
  std::string origin;
  bool preflight = false;  // has Access-Control-Request-Method
};

struct HttpResponse {
  int status = 200;
  std::string content_type = "application/json";  // empty: no such header field
  std::string body;
  std::vector<std::pair<std::string, std::string>> headers;  // others
};

// Post is for any thread; everything else runs in the connection's strand: where the handler is called, where posted
// jobs and the listener's methods run. One answer per exchange: Respond, or BeginStream and what follows.
class HttpExchange {
 public:
  class Listener {
   public:
    virtual ~Listener() = default;
    // What was flushed has been given to the socket: buffer() is empty again.
    virtual void OnWritten() = 0;
    // The client has gone, or the server stops: nothing can be sent. Neither method is called after it.
    virtual void OnGone() = 0;
  };

  virtual ~HttpExchange() = default;

  // Runs `job` in the strand; not before Post returns. Jobs that are left when the server ends are dropped.
  virtual void Post(std::function<void()> job) = 0;

  // Until the answer is complete. Whole and unchanged, but for what the handler moves out of it.
  virtual HttpRequest& request() = 0;

  // A header field of the answer, whoever makes it. Before the answer begins.
  virtual void AddHeader(std::string_view name, std::string_view value) = 0;

  // For who answers later than the handler returns; held until the answer is complete. Calls OnGone if it is too late.
  virtual void Listen(std::shared_ptr<Listener> listener) = 0;

  // The whole answer; ends the exchange. Also after BeginStream, in place of the stream, until it has started.
  virtual void Respond(HttpResponse response) = 0;

  // An answer in pieces. Its head goes out with the first piece or heartbeat: `heartbeat` is sent whenever nothing has
  // been for `heartbeat_every`. `head.body` is not used.
  virtual void BeginStream(HttpResponse head, std::string_view heartbeat, absl::Duration heartbeat_every) = 0;
  // Whether any of the answer may have been sent.
  virtual bool started() const = 0;
  // The next piece is put here, then Flush is called; not to be touched from then to OnWritten.
  virtual std::string& buffer() = 0;
  // `last` ends the exchange; no OnWritten follows.
  virtual void Flush(bool last) = 0;
  // What is flushed but unwritten after so long from now resets the connection.
  virtual void LimitWriting(absl::Duration limit) = 0;
};

}  // namespace soloist

#endif  // SOLOIST_SERVER_HTTP_EXCHANGE_H_
