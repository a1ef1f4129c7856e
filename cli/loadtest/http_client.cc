#include "cli/loadtest/http_client.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <deque>
#include <optional>
#include <string_view>
#include <thread>
#include <utility>

#include "base/clock.h"
#include "base/status.h"
#include "boost/asio/executor_work_guard.hpp"
#include "boost/asio/io_context.hpp"
#include "boost/asio/ip/tcp.hpp"
#include "boost/asio/post.hpp"
#include "boost/asio/write.hpp"
#include "boost/beast/core/buffers_range.hpp"
#include "boost/beast/core/flat_buffer.hpp"
#include "boost/beast/core/tcp_stream.hpp"
#include "boost/beast/http/parser.hpp"
#include "boost/beast/http/read.hpp"
#include "boost/beast/http/string_body.hpp"
#include "cli/loadtest/openai_stream.h"
#include "cli/loadtest/url.h"
#include "nlohmann/json.hpp"

namespace soloist::cli {
namespace {

namespace asio = boost::asio;
namespace beast = boost::beast;
namespace http = boost::beast::http;
using asio::ip::tcp;
using boost::system::error_code;
using Json = nlohmann::ordered_json;

constexpr std::chrono::seconds kControlTimeout(10);
constexpr size_t kMaxErrorBytes = 4096;
constexpr size_t kReadBytes = 16 << 10;

// What every request of a client has in common.
struct Target {
  Url url;
  tcp::endpoint endpoint;
  std::string path;         // of completions
  std::string header_text;  // Host and the caller's own header lines
  bool chat = false;
  std::string model;
  Json extra_body;
};

std::string RequestText(const Target& target, std::string_view method, const std::string& path,
                        const std::string& body) {
  return fmt::format(
      "{} {}{} HTTP/1.1\r\n{}User-Agent: soloist-bench\r\nContent-Type: application/json\r\nContent-Length: "
      "{}\r\n\r\n{}",
      method, target.url.prefix, path, target.header_text, body.size(), body);
}

std::string CompletionBody(const Target& target, const PlannedRequest& planned) {
  static constexpr const char* kWords[] = {"the", "of", "and", "to", "in", "is", "was", "for",
                                           "on",  "it", "as",  "at", "by", "he", "be",  "his"};
  Json body = {{"model", target.model}};
  if (target.chat) {
    std::string text = planned.text;
    for (const int32_t id : planned.prompt) {
      if (!text.empty()) text += ' ';
      text += kWords[static_cast<uint32_t>(id) % std::size(kWords)];
    }
    body["messages"] = {{{"role", "user"}, {"content", std::move(text)}}};
  } else if (planned.text.empty()) {
    body["prompt"] = planned.prompt;
  } else {
    body["prompt"] = planned.text;
  }
  body[target.chat ? "max_completion_tokens" : "max_tokens"] = planned.output_tokens;
  body["temperature"] = 0;
  body["ignore_eos"] = true;
  body["stream"] = true;
  body["stream_options"] = {{"include_usage", true}, {"continuous_usage_stats", true}};
  body["return_token_ids"] = true;
  if (!target.extra_body.is_null()) body.merge_patch(target.extra_body);
  return body.dump(-1, ' ', false, Json::error_handler_t::replace);
}

struct Connection {
  explicit Connection(asio::io_context& context) : socket(context) { buffer.reserve(kReadBytes); }
  tcp::socket socket;
  beast::flat_buffer buffer;
};

// One thread's sockets.
struct Loop {
  asio::io_context context{1};
  asio::executor_work_guard<asio::io_context::executor_type> work = asio::make_work_guard(context);
  std::vector<std::unique_ptr<Connection>> idle;  // connections that wait for a request; of the loop's thread
  std::thread thread;
};

// Whatever takes an answer's body as it comes.
class BodyTaker {
 public:
  virtual ~BodyTaker() = default;
  // False: enough, hang up.
  virtual bool OnBody(std::string_view piece) = 0;
};

// Beast's body that goes to a BodyTaker piece by piece.
struct TakenBody {
  using value_type = BodyTaker*;
  class reader {
   public:
    // Beast constructs it before the parser's owner has set the body.
    template <bool IsRequest, class Fields>
    reader(http::header<IsRequest, Fields>&, value_type& taker) : taker_(taker) {}
    void init(const boost::optional<std::uint64_t>&, error_code& error) { error = {}; }
    template <class Buffers>
    size_t put(const Buffers& buffers, error_code& error) {
      size_t taken = 0;
      for (const asio::const_buffer& buffer : beast::buffers_range_ref(buffers)) {
        if (!taker_->OnBody({static_cast<const char*>(buffer.data()), buffer.size()})) {
          error = asio::error::operation_aborted;
          return taken;
        }
        taken += buffer.size();
      }
      error = {};
      return taken;
    }
    void finish(error_code& error) { error = {}; }

   private:
    const value_type& taker_;
  };
};

class HttpCall final : public PreparedCall, public BodyTaker, public std::enable_shared_from_this<HttpCall> {
 public:
  HttpCall(Loop& loop, const Target& target, const PlannedRequest& planned, RequestRecord* record,
           std::function<void()> done)
      : loop_(loop),
        target_(target),
        record_(*record),
        done_(std::move(done)),
        request_(RequestText(target, "POST", target.path, CompletionBody(target, planned))),
        answer_(record_) {}

  void Send() override {
    asio::post(loop_.context, [self = shared_from_this()] { self->Begin(); });
  }

  bool OnBody(std::string_view piece) override {
    if (parser_->get().result_int() != 200) {
      record_.detail += piece.substr(0, kMaxErrorBytes - std::min(kMaxErrorBytes, record_.detail.size()));
      return true;
    }
    const int64_t now_ns = Clock::Real().NowNs();
    well_formed_ = sse_.Feed(piece, [&](std::string_view data) { answer_.OnData(now_ns, data); });
    hung_up_ = record_.cancel_after_tokens > 0 && record_.output_tokens >= record_.cancel_after_tokens;
    return well_formed_ && !hung_up_;
  }

 private:
  void Begin() {
    record_.sent_ns = Clock::Real().NowNs();
    if (loop_.idle.empty()) return Connect();
    connection_ = std::move(loop_.idle.back());
    loop_.idle.pop_back();
    reused_ = true;
    Write();
  }
  void Connect() {
    connection_ = std::make_unique<Connection>(loop_.context);
    reused_ = false;
    connection_->socket.async_connect(target_.endpoint, [self = shared_from_this()](error_code error) {
      if (error) return self->End(error);
      error_code ignored;
      self->connection_->socket.set_option(tcp::no_delay(true), ignored);
      self->Write();
    });
  }
  void Write() {
    asio::async_write(connection_->socket, asio::buffer(request_),
                      [self = shared_from_this()](error_code error, size_t) {
                        if (error) return self->End(error);
                        self->Read();
                      });
  }
  void Read() {
    parser_.emplace();
    parser_->get().body() = this;
    parser_->body_limit(boost::none);
    http::async_read(connection_->socket, connection_->buffer, *parser_,
                     [self = shared_from_this()](error_code error, size_t) { self->End(error); });
  }
  void End(error_code error) {
    // The server may close a connection that it has kept alive just when a request goes out on it.
    if (error && reused_ && !(parser_ && parser_->got_some())) {
      connection_.reset();
      return Connect();
    }
    record_.end_ns = Clock::Real().NowNs();
    const unsigned status = parser_ && parser_->is_header_done() ? parser_->get().result_int() : 0;
    if (hung_up_) {
      record_.outcome = "cancelled";
    } else if (status != 0 && status != 200) {
      record_.outcome = fmt::format("HTTP {}", status);
    } else if (!well_formed_) {
      record_.outcome = "event too long";
    } else if (error) {
      record_.outcome = error == http::error::end_of_stream ? "connection closed" : error.message();
    } else {
      record_.outcome = answer_.Finish();
    }
    if (!error && parser_->keep_alive() && connection_->buffer.size() == 0) {
      loop_.idle.push_back(std::move(connection_));
    }
    connection_.reset();
    done_();
  }

  Loop& loop_;
  const Target& target_;
  RequestRecord& record_;
  const std::function<void()> done_;
  const std::string request_;
  SseParser sse_;
  StreamedAnswer answer_;
  std::unique_ptr<Connection> connection_;
  std::optional<http::response_parser<TakenBody>> parser_;
  bool reused_ = false, well_formed_ = true, hung_up_ = false;
};

// One request on a connection of its own.
absl::StatusOr<std::pair<unsigned, std::string>> Ask(const Target& target, std::string_view method,
                                                     const std::string& path, const std::string& body) {
  asio::io_context context(1);
  beast::tcp_stream stream(context);
  stream.expires_after(kControlTimeout);
  const std::string text = RequestText(target, method, path, body);
  beast::flat_buffer buffer;
  http::response_parser<http::string_body> parser;
  parser.body_limit(size_t{64} << 20);
  error_code result;
  stream.async_connect(target.endpoint, [&](error_code error) {
    result = error;
    if (result) return;
    asio::async_write(stream, asio::buffer(text), [&](error_code write_error, size_t) {
      result = write_error;
      if (result) return;
      http::async_read(stream, buffer, parser, [&](error_code read_error, size_t) { result = read_error; });
    });
  });
  context.run();
  if (result) {
    return Unavailable("{}:{}{}{}: {}", target.url.host, target.url.port, target.url.prefix, path, result.message());
  }
  return std::make_pair(parser.get().result_int(), std::move(parser.get().body()));
}

class Client final : public HttpLoadClient {
 public:
  Client(const HttpClientOptions& options, Target target, ServerDescription server)
      : target_(std::move(target)), server_(std::move(server)) {
    for (int i = 0; i < options.threads; ++i) loops_.emplace_back();
  }
  ~Client() override {
    for (Loop& loop : loops_) loop.work.reset();
    for (Loop& loop : loops_) {
      if (loop.thread.joinable()) loop.thread.join();
    }
  }
  // Before Run.
  absl::Status Open(int connections) {
    for (int i = 0; i < connections; ++i) {
      Loop& loop = loops_[static_cast<size_t>(i) % loops_.size()];
      auto connection = std::make_unique<Connection>(loop.context);
      error_code error;
      connection->socket.connect(target_.endpoint, error);
      if (!error) connection->socket.set_option(tcp::no_delay(true), error);
      if (error)
        return Unavailable("connection {} of {} to {}: {}", i + 1, connections, target_.url.host, error.message());
      loop.idle.push_back(std::move(connection));
    }
    return absl::OkStatus();
  }
  void Run() {
    for (Loop& loop : loops_) loop.thread = std::thread([&loop] { loop.context.run(); });
  }

  std::shared_ptr<PreparedCall> Prepare(const PlannedRequest& request, RequestRecord* record,
                                        std::function<void()> done) override {
    return std::make_shared<HttpCall>(loops_[next_++ % loops_.size()], target_, request, record, std::move(done));
  }
  absl::StatusOr<int> CountTokens(const std::string& text) override {
    const Json body = {{"model", target_.model}, {"prompt", text}, {"add_special_tokens", false}};
    ASSIGN_OR_RETURN(const auto answer,
                     Ask(target_, "POST", "/tokenize", body.dump(-1, ' ', false, Json::error_handler_t::replace)));
    const Json json = Json::parse(answer.second, nullptr, /*allow_exceptions=*/false);
    if (answer.first != 200 || !json.is_object() || !json.contains("count") || !json["count"].is_number_integer()) {
      return Unimplemented("the server counts no tokens: POST /tokenize gave {}", answer.first);
    }
    return json["count"].get<int>();
  }
  const ServerDescription& server() const override { return server_; }

 private:
  const Target target_;
  const ServerDescription server_;
  std::deque<Loop> loops_;
  std::atomic<size_t> next_{0};
};

}  // namespace

absl::StatusOr<std::unique_ptr<HttpLoadClient>> HttpLoadClient::Connect(const HttpClientOptions& options) {
  Target target;
  ASSIGN_OR_RETURN(target.url, ParseUrl(options.url));
  target.chat = options.chat;
  target.path = options.chat ? "/v1/chat/completions" : "/v1/completions";
  const bool ipv6 = target.url.host.find(':') != std::string::npos;
  target.header_text =
      fmt::format("Host: {}{}{}:{}\r\n", ipv6 ? "[" : "", target.url.host, ipv6 ? "]" : "", target.url.port);
  for (const std::string& header : options.headers) {
    if (header.find(": ") == std::string::npos || header.find_first_of("\r\n") != std::string::npos) {
      return InvalidArgument("header '{}' is not 'Name: value'", header);
    }
    target.header_text += header + "\r\n";
  }
  if (!options.extra_body.empty()) {
    target.extra_body = Json::parse(options.extra_body, nullptr, /*allow_exceptions=*/false);
    if (!target.extra_body.is_object())
      return InvalidArgument("extra body '{}' is not a JSON object", options.extra_body);
  }
  error_code error;
  asio::io_context context(1);
  tcp::resolver resolver(context);
  const auto found = resolver.resolve(target.url.host, target.url.port, error);
  if (error || found.empty()) return Unavailable("{}: {}", target.url.host, error.message());
  target.endpoint = found.begin()->endpoint();
  // "localhost" may be ::1 first, where nobody listens.
  for (const auto& entry : found) {
    tcp::socket probe(context);
    probe.connect(entry.endpoint(), error);
    if (!error) {
      target.endpoint = entry.endpoint();
      break;
    }
  }

  ServerDescription server;
  ASSIGN_OR_RETURN(const auto models, Ask(target, "GET", "/v1/models", ""));
  const Json list = Json::parse(models.second, nullptr, /*allow_exceptions=*/false);
  if (models.first == 200 && list.is_object() && list.contains("data") && list["data"].is_array()) {
    for (const Json& model : list["data"]) {
      if (!model.is_object() || !model.contains("id") || !model["id"].is_string()) continue;
      if (!options.model.empty() && model["id"] != options.model) continue;
      server.model = model["id"].get<std::string>();
      if (model.contains("max_model_len") && model["max_model_len"].is_number_integer()) {
        server.max_model_len = model["max_model_len"].get<int>();
      }
      break;
    }
  }
  if (server.model.empty()) server.model = options.model;
  if (server.model.empty()) {
    return NotFound("{}: GET /v1/models gave {} and no model; name one (--model)", options.url, models.first);
  }
  target.model = server.model;
  ASSIGN_OR_RETURN(const auto version, Ask(target, "GET", "/version", ""));
  const Json says = Json::parse(version.second, nullptr, /*allow_exceptions=*/false);
  if (version.first == 200 && says.is_object() && says.contains("version") && says["version"].is_string()) {
    server.version = says["version"].get<std::string>();
  }
  auto client = std::make_unique<Client>(options, std::move(target), std::move(server));
  RETURN_IF_ERROR(client->Open(options.connections));
  client->Run();
  return client;
}

}  // namespace soloist::cli
