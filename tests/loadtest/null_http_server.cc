#include "tests/loadtest/null_http_server.h"

#include <netinet/in.h>
#include <netinet/tcp.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <cstdlib>
#include <utility>

#include "base/clock.h"
#include "fmt/format.h"
#include "nlohmann/json.hpp"

namespace soloist {
namespace {

using Json = nlohmann::json;

std::string Chunk(const std::string& text) { return fmt::format("{:x}\r\n{}\r\n", text.size(), text); }

std::string Whole(int status, const std::string& body) {
  return fmt::format("HTTP/1.1 {} X\r\nContent-Type: application/json\r\nContent-Length: {}\r\n\r\n{}", status,
                     body.size(), body);
}

}  // namespace

NullHttpServer::NullHttpServer(const NullHttpOptions& options) : options_(options) {
  listener_ = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
  const int on = 1;
  setsockopt(listener_, SOL_SOCKET, SO_REUSEADDR, &on, sizeof(on));
  sockaddr_in address{};
  address.sin_family = AF_INET;
  address.sin_port = htons(static_cast<uint16_t>(options.port));
  address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  socklen_t size = sizeof(address);
  if (bind(listener_, reinterpret_cast<sockaddr*>(&address), size) != 0 || listen(listener_, 4096) != 0) return;
  getsockname(listener_, reinterpret_cast<sockaddr*>(&address), &size);
  port_ = ntohs(address.sin_port);
  epoll_ = epoll_create1(EPOLL_CLOEXEC);
  stop_ = eventfd(0, EFD_CLOEXEC);
  for (const int fd : {listener_, stop_}) {
    epoll_event event{.events = EPOLLIN, .data = {.fd = fd}};
    epoll_ctl(epoll_, EPOLL_CTL_ADD, fd, &event);
  }
  thread_ = std::thread([this] { Run(); });
}

NullHttpServer::~NullHttpServer() {
  if (thread_.joinable()) {
    eventfd_write(stop_, 1);
    thread_.join();
  }
  for (const auto& [fd, stream] : streams_) close(fd);
  for (const int fd : {listener_, epoll_, stop_}) {
    if (fd >= 0) close(fd);
  }
}

std::string NullHttpServer::last_request() {
  std::lock_guard lock(mutex_);
  return last_request_;
}

void NullHttpServer::Run() {
  std::vector<epoll_event> events(1024);
  for (;;) {
    int wait_ms = -1;
    if (!due_.empty()) {
      const int64_t ns = std::max<int64_t>(0, due_.top().first - Clock::Real().NowNs());
      wait_ms = static_cast<int>((ns + 999'999) / 1'000'000);
    }
    const int count = epoll_wait(epoll_, events.data(), static_cast<int>(events.size()), wait_ms);
    for (int i = 0; i < count; ++i) {
      const int fd = events[i].data.fd;
      if (fd == stop_) return;
      if (fd == listener_) {
        Accept();
        continue;
      }
      if (streams_.contains(fd) && (events[i].events & EPOLLOUT) != 0) Write(fd);
      if (streams_.contains(fd) && (events[i].events & ~static_cast<uint32_t>(EPOLLOUT)) != 0) Read(fd);
    }
    const int64_t now_ns = Clock::Real().NowNs();
    while (!due_.empty() && due_.top().first <= now_ns) {
      const int fd = due_.top().second;
      due_.pop();
      WriteDue(fd, now_ns);
    }
  }
}

void NullHttpServer::Accept() {
  for (;;) {
    const int fd = accept4(listener_, nullptr, nullptr, SOCK_NONBLOCK | SOCK_CLOEXEC);
    if (fd < 0) return;
    ++accepted_;
    const int on = 1;
    setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof(on));
    streams_.emplace(fd, Stream());
    epoll_event event{.events = EPOLLIN, .data = {.fd = fd}};
    epoll_ctl(epoll_, EPOLL_CTL_ADD, fd, &event);
  }
}

void NullHttpServer::Close(int fd) {
  streams_.erase(fd);
  close(fd);
}

void NullHttpServer::Read(int fd) {
  Stream& stream = streams_.at(fd);
  char buffer[65536];
  for (;;) {
    const ssize_t count = read(fd, buffer, sizeof(buffer));
    if (count == 0 || (count < 0 && errno != EAGAIN)) return Close(fd);
    if (count < 0) break;
    stream.in.append(buffer, static_cast<size_t>(count));
  }
  const size_t header_end = stream.in.find("\r\n\r\n");
  if (header_end == std::string::npos) return;
  const std::string header = stream.in.substr(0, header_end);
  const size_t field = header.find("Content-Length: ");
  const size_t length = field == std::string::npos ? 0 : std::strtoull(header.c_str() + field + 16, nullptr, 10);
  if (stream.in.size() < header_end + 4 + length) return;
  const std::string body = stream.in.substr(header_end + 4, length);
  stream.in.erase(0, header_end + 4 + length);
  Answer(fd, header, body);
}

void NullHttpServer::Answer(int fd, const std::string& header, const std::string& body) {
  Stream& stream = streams_.at(fd);
  if (header.starts_with("POST")) {
    std::lock_guard lock(mutex_);
    last_request_ = header + "\r\n\r\n" + body;
  }
  const Json request = Json::parse(body, nullptr, /*allow_exceptions=*/false);
  if (header.starts_with("GET /v1/models ")) {
    stream.out = Whole(200, R"({"object":"list","data":[{"id":"null","object":"model","max_model_len":65536}]})");
  } else if (header.starts_with("GET /version ")) {
    stream.out = Whole(200, R"({"version":"null"})");
  } else if (header.starts_with("POST /tokenize ")) {
    stream.out = Whole(200, fmt::format(R"({{"count":{}}})", request.value("prompt", "").size()));
  } else if (header.starts_with("POST /v1/") && options_.refuse_status != 0) {
    stream.out = Whole(options_.refuse_status, R"({"error":{"message":"refused, as told"}})");
  } else if (header.starts_with("POST /v1/") && request.is_object()) {
    stream.chat = header.starts_with("POST /v1/chat/");
    stream.tokens = request.value(stream.chat ? "max_completion_tokens" : "max_tokens", 1);
    if (stream.chat) {
      const auto text = request["messages"][0].value("content", "");
      stream.prompt_tokens = 1 + static_cast<int>(std::ranges::count(text, ' '));
    } else {
      stream.prompt_tokens = static_cast<int>(request["prompt"].size());
    }
    stream.sent = 0;
    stream.streaming = true;
    stream.start_ns = Clock::Real().NowNs();
    stream.out = "HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n";
    due_.emplace(stream.start_ns + std::chrono::nanoseconds(options_.interval).count(), fd);
  } else {
    stream.out = Whole(404, "{}");
  }
  Write(fd);
}

void NullHttpServer::WriteDue(int fd, int64_t now_ns) {
  const auto found = streams_.find(fd);
  if (found == streams_.end() || !found->second.streaming) return;
  Stream& stream = found->second;
  const int64_t interval_ns = std::chrono::nanoseconds(options_.interval).count();
  // A reader that is behind gets more later.
  if (!stream.out.empty()) return due_.emplace(now_ns + interval_ns, fd);
  const int until =
      static_cast<int>(std::clamp<int64_t>((now_ns - stream.start_ns) / interval_ns, stream.sent, stream.tokens));
  using Count = NullHttpOptions::Count;
  if (until > stream.sent) {
    std::string ids, text;
    for (int id = stream.sent; id < until; ++id) {
      ids += (ids.empty() ? "" : ",") + std::to_string(id);
      text += " x";
    }
    std::string event =
        R"(data: {"id":"cmpl-0","object":"text_completion","created":0,"model":"null","choices":[{"index":0,)";
    event += stream.chat ? R"("delta":{"content":")" + text + R"("})" : R"("text":")" + text + '"';
    if (options_.count == Count::kTokenIds) event += R"(,"token_ids":[)" + ids + ']';
    event += R"(,"logprobs":null,"finish_reason":null}])";
    if (options_.count == Count::kUsagePerChunk) {
      event += fmt::format(R"(,"usage":{{"prompt_tokens":{},"completion_tokens":{}}})", stream.prompt_tokens, until);
    }
    stream.out = Chunk(event + "}\n\n");
    stream.sent = until;
  }
  if (options_.break_after_tokens != 0 && stream.sent >= options_.break_after_tokens) {
    Write(fd);
    if (streams_.contains(fd)) Close(fd);
    return;
  }
  if (stream.sent == stream.tokens) {
    std::string end = R"(data: {"choices":[{"index":0,"text":"","delta":{},"finish_reason":"length"}]})"
                      "\n\n";
    if (options_.count != Count::kNothing) {
      end += fmt::format("data: {{\"choices\":[],\"usage\":{{\"prompt_tokens\":{},\"completion_tokens\":{}}}}}\n\n",
                         stream.prompt_tokens, stream.sent);
    }
    stream.out += Chunk(end + "data: [DONE]\n\n") + "0\r\n\r\n";
    stream.streaming = false;
  } else {
    due_.emplace(stream.start_ns + interval_ns * (stream.sent + 1), fd);
  }
  Write(fd);
}

void NullHttpServer::Write(int fd) {
  Stream& stream = streams_.at(fd);
  const size_t piece = options_.write_bytes == 0 ? stream.out.size() : options_.write_bytes;
  size_t at = 0;
  while (at < stream.out.size()) {
    const ssize_t count = send(fd, stream.out.data() + at, std::min(piece, stream.out.size() - at), MSG_NOSIGNAL);
    if (count < 0 && errno != EAGAIN) return Close(fd);
    if (count < 0) break;
    at += static_cast<size_t>(count);
  }
  stream.out.erase(0, at);
  if (stream.want_write != !stream.out.empty()) {
    stream.want_write = !stream.out.empty();
    epoll_event event{.events = EPOLLIN | (stream.want_write ? EPOLLOUT : 0u), .data = {.fd = fd}};
    epoll_ctl(epoll_, EPOLL_CTL_MOD, fd, &event);
  }
  if (options_.close_after_answer && stream.out.empty() && !stream.streaming) Close(fd);
}

}  // namespace soloist
