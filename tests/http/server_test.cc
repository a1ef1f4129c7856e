// The HTTP server in this process, over a simulated engine: clients that come and go at random, an engine that fails,
// the server's end; and that /openapi.json describes what is served.
#include <arpa/inet.h>
#include <netinet/in.h>
#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <memory>
#include <random>
#include <set>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "base/clock.h"
#include "engine/simulated_engine.h"
#include "gtest/gtest.h"
#include "scheduler/step_loop.h"
#include "server/http/api.h"
#include "server/http/api_error.h"
#include "server/http/http_server.h"
#include "tests/scheduler/testing.h"

namespace soloist {
namespace {

template <typename Condition>
bool Within20s(const Condition& condition) {
  for (int i = 0; i < 4'000; ++i) {
    if (condition()) return true;
    std::this_thread::sleep_for(std::chrono::milliseconds(5));
  }
  return false;
}

// A blocking TCP connection.
class Client {
 public:
  explicit Client(const std::string& address) : socket_(socket(AF_INET, SOCK_STREAM, 0)) {
    sockaddr_in to = {.sin_family = AF_INET,
                      .sin_port = htons(static_cast<uint16_t>(std::stoi(address.substr(address.rfind(':') + 1)))),
                      .sin_addr = {.s_addr = htonl(INADDR_LOOPBACK)}};
    EXPECT_EQ(connect(socket_, reinterpret_cast<sockaddr*>(&to), sizeof(to)), 0);
  }
  ~Client() { close(socket_); }
  Client(const Client&) = delete;
  Client& operator=(const Client&) = delete;

  void Send(const std::string& text) { send(socket_, text.data(), text.size(), MSG_NOSIGNAL); }
  void Post(const std::string& path, const std::string& body) {
    Send("POST " + path + " HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: " +
         std::to_string(body.size()) + "\r\n\r\n" + body);
  }
  // Reads until `text` has come; everything so far. Shorter if the server closes.
  const std::string& Until(const std::string& text) {
    char piece[4096];
    while (got_.find(text) == std::string::npos) {
      const ssize_t bytes = recv(socket_, piece, sizeof(piece), 0);
      if (bytes <= 0) break;
      got_.append(piece, static_cast<size_t>(bytes));
    }
    return got_;
  }
  const std::string& UntilClosed() { return Until("never to be seen"); }
  void Forget() { got_.clear(); }

 private:
  const int socket_;
  std::string got_;
};

class ServerTest : public testing::Test {
 protected:
  void Start(int64_t fail_at_step = 0, std::chrono::microseconds step = std::chrono::microseconds(200),
             const HttpServerOptions& http = {}) {
    SimulatedOptions simulated;
    simulated.num_homes = 2;
    simulated.limits = TestLimits(256, 4);
    simulated.delay = [step](int64_t, int64_t) { std::this_thread::sleep_for(step); };
    simulated.fail_at_step = fail_at_step;
    engine_ = std::make_unique<SimulatedEngine>(simulated);
    loop_ = *StepLoop::Create({}, *engine_, Clock::Real());
    ModelDescription model;
    model.name = "simulated";
    FrontendOptions options;
    options.log_requests = false;
    frontend_ = std::make_unique<Frontend>(options, model, *Tokenizer::Load("models/tiny"), Clock::Real());
    frontend_->Start(*engine_, *loop_);
    api_ = std::make_unique<HttpApi>(*frontend_, HttpApiOptions{});
    server_ = *HttpServer::Create(
        "127.0.0.1:0", http, [this](const std::shared_ptr<HttpExchange>& exchange) { api_->Handle(exchange); },
        [](int status, const std::string& message) {
          return ErrorResponse({.status = status, .message = message, .param = {}, .code = {}});
        });
  }
  ~ServerTest() override {
    server_->Shutdown(absl::ZeroDuration());
    frontend_->Stop();
    loop_.reset();
  }
  bool Idle() const {
    const LoadSnapshot load = loop_->Load();
    return load.running_requests == 0 && load.waiting_requests == 0 && frontend_->open_streams() == 0;
  }

  std::unique_ptr<SimulatedEngine> engine_;
  std::unique_ptr<StepLoop> loop_;
  std::unique_ptr<Frontend> frontend_;
  std::unique_ptr<HttpApi> api_;
  std::unique_ptr<HttpServer> server_;
};

constexpr char kStream[] = R"({"prompt": [1, 2, 3], "max_tokens": 40, "stream": true, "n": 2})";
constexpr char kDone[] = "data: [DONE]\n\n\r\n0\r\n\r\n";

TEST_F(ServerTest, ClientsComeAndGo) {
  Start();
  std::atomic<int> whole = 0;
  std::vector<std::thread> clients;
  for (unsigned seed = 0; seed < 12; ++seed) {
    clients.emplace_back([&, seed] {
      std::mt19937 random(seed);
      for (int round = 0; round < 15; ++round) {
        Client client(server_->address());
        for (bool open = true; open;) {
          client.Forget();
          open = random() % 3 != 0;
          switch (random() % 6) {
            case 0:  // to its end
              client.Post("/v1/completions", kStream);
              EXPECT_NE(client.Until(kDone).find(kDone), std::string::npos);
              ++whole;
              break;
            case 1:  // goes away in the middle
              client.Post("/v1/completions", kStream);
              client.Until("data: ");
              open = false;
              break;
            case 2:  // goes away at once
              client.Post("/v1/completions", kStream);
              open = false;
              break;
            case 3:  // not streamed, several prompts
              client.Post("/v1/completions", R"({"prompt": [[1, 2], [3], [4, 5]], "max_tokens": 8})");
              EXPECT_NE(client.Until(R"("usage")").find(R"("index":2)"), std::string::npos);
              client.Until("}}}");
              break;
            case 4:  // refused, one of three
              client.Post("/v1/completions", R"({"prompt": [[1, 2], [3], [97]], "max_tokens": 8})");
              EXPECT_NE(client.Until("}}").find("prompt 2: "), std::string::npos);
              break;
            default:
              client.Send("GET /load HTTP/1.1\r\nHost: x\r\n\r\nGET /metrics HTTP/1.1\r\nHost: x\r\n\r\n");
              EXPECT_NE(client.Until("soloist:state{").find("text/plain"), std::string::npos);
              open = false;
          }
        }
      }
    });
  }
  for (std::thread& client : clients) client.join();
  EXPECT_GT(whole, 20);
  EXPECT_TRUE(Within20s([&] { return Idle(); }));
  EXPECT_TRUE(Within20s([&] { return server_->connections() == 0; }));
}

// What all connections hold together has a bound, whose room comes back some time after a request is answered.
TEST_F(ServerTest, BodiesFillTheMemory) {
  Start(0, std::chrono::microseconds(200), {.max_held_bytes = 100'000});
  const std::string good = R"({"prompt": [1, 2, 3], "max_tokens": 1})", blanks(60'000, ' ');
  const auto status = [](Client& client) { return client.Until("\r\n").substr(0, 12); };
  const auto ask = [&](int64_t bytes) {
    Client client(server_->address());
    client.Post("/v1/completions", good + std::string(bytes - good.size(), ' '));
    return status(client);
  };
  EXPECT_EQ(ask(100'001), "HTTP/1.1 503");
  EXPECT_TRUE(Within20s([&] { return ask(100'000) == "HTTP/1.1 200"; }));
  // While another one is on its way, of which 60,000 bytes have come: tried until these were read first.
  EXPECT_TRUE(Within20s([&] {
    Client slow(server_->address());
    slow.Send("POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: " +
              std::to_string(good.size() + blanks.size()) + "\r\n\r\n" + blanks);
    const bool refused = ask(40'001) == "HTTP/1.1 503";
    slow.Send(good);
    return refused && status(slow) == "HTTP/1.1 200";
  }));
  EXPECT_TRUE(Within20s([&] { return ask(99'000) == "HTTP/1.1 200"; }));
}

TEST_F(ServerTest, EngineThatFailsBeforeTheFirstToken) {
  Start(1);
  Client client(server_->address());
  client.Post("/v1/completions", kStream);
  const std::string& answer = client.Until("}}");
  EXPECT_TRUE(answer.starts_with("HTTP/1.1 503 ")) << answer;
  EXPECT_NE(answer.find(R"({"error":{"message":")"), std::string::npos) << answer;
}

TEST_F(ServerTest, EngineThatFailsInTheMiddle) {
  Start(20);
  Client client(server_->address());
  client.Post("/v1/completions", kStream);
  const std::string& answer = client.Until(kDone);
  EXPECT_TRUE(answer.starts_with("HTTP/1.1 200 ")) << answer;
  EXPECT_NE(answer.find(R"(data: {"error":{"message":")"), std::string::npos) << answer;
  EXPECT_NE(answer.find(kDone), std::string::npos);
  client.Forget();
  client.Send("GET /health HTTP/1.1\r\nHost: x\r\n\r\n");
  EXPECT_TRUE(client.Until("}}").starts_with("HTTP/1.1 503 "));
}

TEST_F(ServerTest, ShutdownWaitsThenResets) {
  Start(0, std::chrono::milliseconds(5));
  Client one(server_->address()), idle(server_->address());
  one.Post("/v1/completions", kStream);
  one.Until("data: ");
  std::thread reader([&] { EXPECT_NE(one.UntilClosed().find(kDone), std::string::npos); });
  server_->Shutdown(absl::Seconds(20));
  reader.join();
  EXPECT_EQ(idle.UntilClosed(), "");
  EXPECT_EQ(server_->connections(), 0);
}

TEST_F(ServerTest, ShutdownResetsWhatRuns) {
  Start(0, std::chrono::milliseconds(5));
  std::vector<std::unique_ptr<Client>> clients;
  for (int i = 0; i < 8; ++i) {
    clients.push_back(std::make_unique<Client>(server_->address()));
    clients.back()->Post("/v1/completions", kStream);
  }
  clients[0]->Until("data: ");
  server_->Shutdown(absl::ZeroDuration());
  EXPECT_EQ(clients[0]->UntilClosed().find(kDone), std::string::npos);
  EXPECT_TRUE(Within20s([&] { return Idle(); }));
}

TEST_F(ServerTest, ChatWithoutATemplate) {
  Start();
  Client client(server_->address());
  client.Post("/v1/chat/completions", R"({"messages": [{"role": "user", "content": "hello"}]})");
  const std::string& answer = client.Until("}}");
  EXPECT_TRUE(answer.starts_with("HTTP/1.1 400 ")) << answer;
  EXPECT_NE(answer.find("chat template"), std::string::npos) << answer;
}

TEST_F(ServerTest, DescriptionIsOfWhatIsServed) {
  Start();
  Client client(server_->address());
  client.Send("GET /openapi.json HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n");
  const std::string& answer = client.UntilClosed();
  const nlohmann::json description = nlohmann::json::parse(answer.substr(answer.find("\r\n\r\n") + 4));
  std::set<std::pair<std::string, std::string>> described, served;
  for (const auto& [path, methods] : description["paths"].items()) {
    for (const auto& [method, unused] : methods.items()) described.emplace(path, method == "get" ? "GET" : "POST");
  }
  for (const HttpApi::Route& route : HttpApi::Routes()) {
    const bool of_a_model = route.path.size() > 1 && route.path.ends_with('/');
    served.emplace(std::string(route.path) + (of_a_model ? "{model}" : ""), route.method);
  }
  EXPECT_EQ(described, served);
}

}  // namespace
}  // namespace soloist
