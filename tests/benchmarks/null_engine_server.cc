// The whole server, gRPC and HTTP, over an engine that computes nothing and whose steps take a fixed time: what is left
// is what the server costs, and a client's numbers can be compared with a known truth.
//   null_engine_server GRPC_PORT HTTP_PORT STEP_US     until SIGTERM; run from the repository's root
#include <csignal>
#include <cstdlib>
#include <memory>
#include <string>
#include <thread>

#include "base/clock.h"
#include "engine/simulated_engine.h"
#include "fmt/format.h"
#include "scheduler/step_loop.h"
#include "server/frontend.h"
#include "server/grpc_server.h"
#include "server/http/api.h"
#include "server/http/api_error.h"
#include "server/http/http_server.h"

namespace soloist {
namespace {

int Main(int argc, char** argv) {
  if (argc != 4) {
    fmt::print(stderr, "null_engine_server GRPC_PORT HTTP_PORT STEP_US\n");
    return 2;
  }
  sigset_t signals;
  sigemptyset(&signals);
  sigaddset(&signals, SIGTERM);
  sigaddset(&signals, SIGINT);
  pthread_sigmask(SIG_BLOCK, &signals, nullptr);

  const auto step = std::chrono::microseconds(std::atoll(argv[3]));
  SimulatedOptions simulated;
  simulated.num_homes = 4;
  simulated.check_kv = false;
  simulated.limits = {.vocab_size = 4096,
                      .max_model_len = 2048,
                      .num_blocks = 64 * 128,
                      .block_size = 16,
                      .max_tokens = 2048,
                      .max_sequences = 256};
  // Steps end at a steady pace, whatever the host does between them, unless it is late by a whole step.
  simulated.delay = [step, next = std::chrono::steady_clock::now()](int64_t, int64_t) mutable {
    const auto now = std::chrono::steady_clock::now();
    next = next + step < now ? now + step : next + step;
    std::this_thread::sleep_until(next);
  };
  SimulatedEngine engine(simulated);
  auto loop = StepLoop::Create({}, engine, Clock::Real()).value();
  ModelDescription model;
  model.name = "null";
  FrontendOptions options;
  options.log_requests = false;
  Frontend frontend(options, model, Tokenizer::Load("models/tiny").value(), Clock::Real());
  frontend.Start(engine, *loop);
  const auto grpc = GrpcServer::Create(fmt::format("127.0.0.1:{}", argv[1]), frontend).value();
  HttpApi api(frontend, HttpApiOptions{});
  const auto http = HttpServer::Create(
                        fmt::format("127.0.0.1:{}", argv[2]), {},
                        [&api](const std::shared_ptr<HttpExchange>& exchange) { api.Handle(exchange); },
                        [](int status, const std::string& message) {
                          return ErrorResponse({.status = status, .message = message, .param = {}, .code = {}});
                        })
                        .value();
  fmt::print("gRPC {} HTTP {}\n", grpc->address(), http->address());
  std::fflush(stdout);
  int signal = 0;
  sigwait(&signals, &signal);
  grpc->Shutdown(absl::ZeroDuration());
  http->Shutdown(absl::ZeroDuration());
  frontend.Stop();
  loop.reset();
  return 0;
}

}  // namespace
}  // namespace soloist

int main(int argc, char** argv) { return soloist::Main(argc, argv); }
