// An HTTP server without an engine that streams OpenAI completions: each stream gets a token per interval. A stream
// that is written late gets the tokens due in one event, as the real server's readers do.
#ifndef SOLOIST_TESTS_LOADTEST_NULL_HTTP_SERVER_H_
#define SOLOIST_TESTS_LOADTEST_NULL_HTTP_SERVER_H_

#include <atomic>
#include <chrono>
#include <cstdint>
#include <map>
#include <mutex>
#include <queue>
#include <string>
#include <thread>
#include <vector>

namespace soloist {

struct NullHttpOptions {
  int port = 0;  // 0: any
  std::chrono::microseconds interval{1000};
  // What says how many tokens there are.
  enum class Count { kTokenIds, kUsagePerChunk, kUsageAtEnd, kNothing } count = Count::kTokenIds;
  size_t write_bytes = 0;           // per write; 0: all at once
  int refuse_status = 0;            // of every completion, if not 0
  int break_after_tokens = 0;       // closes the connection in the middle of a stream, if not 0
  bool close_after_answer = false;  // closes the connection that it has promised to keep alive
};

// One thread. Stops when destroyed.
class NullHttpServer {
 public:
  explicit NullHttpServer(const NullHttpOptions& options);
  ~NullHttpServer();
  NullHttpServer(const NullHttpServer&) = delete;
  NullHttpServer& operator=(const NullHttpServer&) = delete;

  // 0: could not listen.
  int port() const { return port_; }
  std::string url() const { return "http://127.0.0.1:" + std::to_string(port_); }
  int accepted_connections() const { return accepted_; }
  // Of the last POST: header and body.
  std::string last_request();

 private:
  struct Stream {
    std::string in, out;
    bool streaming = false, chat = false, want_write = false;
    int64_t start_ns = 0;
    int prompt_tokens = 0, tokens = 0, sent = 0;
  };
  using Due = std::pair<int64_t, int>;  // when, file descriptor

  void Run();
  void Accept();
  void Read(int fd);
  void Answer(int fd, const std::string& header, const std::string& body);
  void WriteDue(int fd, int64_t now_ns);
  void Write(int fd);
  void Close(int fd);

  const NullHttpOptions options_;
  int listener_ = -1, epoll_ = -1, stop_ = -1, port_ = 0;
  std::map<int, Stream> streams_;  // by file descriptor
  std::priority_queue<Due, std::vector<Due>, std::greater<>> due_;
  std::atomic<int> accepted_{0};
  std::mutex mutex_;
  std::string last_request_;
  std::thread thread_;
};

}  // namespace soloist

#endif  // SOLOIST_TESTS_LOADTEST_NULL_HTTP_SERVER_H_
