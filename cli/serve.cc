// soloist serve: the gRPC and the HTTP server; soloist demo: the same server, with one prompt sent to it.
#include <pthread.h>

#include <atomic>
#include <chrono>
#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <optional>
#include <string>
#include <thread>
#include <utility>

#include "base/clock.h"
#include "base/status.h"
#include "cli/flags.h"
#include "cli/http_flags.h"
#include "grpcpp/create_channel.h"
#include "proto/soloist/v1/inference.grpc.pb.h"
#include "server/frontend.h"
#include "server/grpc_server.h"

namespace soloist::cli {
namespace {

// Where /metrics is served, the times of the op groups are there too: one step in so many runs without its graph.
constexpr int kProfileEvery = 1000;

struct ServeFlags {
  EngineFlags runtime;
  FrontendOptions frontend;
  std::string grpc_address = "127.0.0.1:50051";
  HttpFlags http;
  const CLI::Option* profile_every = nullptr;
  double drain_timeout_s = 30;
  double stall_after_s = 30;
  bool check_flags = false;
};

struct DemoFlags {
  EngineFlags runtime;
  std::string prompt = "Once upon a time";
  int32_t max_tokens = 300;
  float temperature = 0.8F;
  float top_p = 0.95F;
  std::optional<uint64_t> seed;
};

absl::StatusOr<std::unique_ptr<Frontend>> CreateFrontend(const EngineFlags& flags, const FrontendOptions& options) {
  ASSIGN_OR_RETURN(ModelDescription model, DescribeModel(flags));
  ASSIGN_OR_RETURN(auto tokenizer, Tokenizer::Load(flags.engine.model_dir));
  return std::make_unique<Frontend>(options, std::move(model), std::move(tokenizer), Clock::Real());
}

// SIGINT and SIGTERM as values: blocked in this thread and in all that it starts later.
class StopSignals {
 public:
  StopSignals() {
    sigemptyset(&set_);
    sigaddset(&set_, SIGINT);
    sigaddset(&set_, SIGTERM);
    pthread_sigmask(SIG_BLOCK, &set_, nullptr);
  }
  // The signal's number, or 0 after a while without one.
  int Wait() const {
    const timespec timeout = {.tv_sec = 0, .tv_nsec = 20'000'000};
    return std::max(0, sigtimedwait(&set_, nullptr, &timeout));
  }

 private:
  sigset_t set_;
};

// Refuses what is new and waits for what is open; true if all of it ended before the timeout and a second signal.
bool Drain(Frontend& frontend, const StopSignals& signals, double timeout_s) {
  frontend.Drain();
  const int64_t deadline = Clock::Real().NowNs() + static_cast<int64_t>(timeout_s * 1e9);
  while (frontend.open_streams() > 0) {
    if (signals.Wait() != 0) {
      spdlog::warn("second signal: cancelling {} requests", frontend.open_streams());
      return false;
    }
    if (Clock::Real().NowNs() > deadline) {
      spdlog::warn("--drain-timeout of {} s is over: cancelling {} requests", timeout_s, frontend.open_streams());
      return false;
    }
  }
  return true;
}

absl::Status Serve(ServeFlags flags) {
  const StopSignals signals;
  flags.frontend.stall_after = absl::Seconds(flags.stall_after_s);
  if (flags.http.enabled() && flags.profile_every->count() == 0) flags.runtime.engine.profile_every = kProfileEvery;
  ASSIGN_OR_RETURN(const auto frontend, CreateFrontend(flags.runtime, flags.frontend));
  absl::StatusOr<Runtime> runtime = Unavailable("the model is loading");
  ASSIGN_OR_RETURN(const auto server, GrpcServer::Create(flags.grpc_address, *frontend));
  ASSIGN_OR_RETURN(const HttpPort http,
                   OpenHttpPort(flags.http, flags.runtime.engine.model_dir, flags.grpc_address, *frontend));
  fmt::print("listening on {}\n", server->address());
  if (http.server != nullptr) fmt::print("listening for HTTP on {}\n", http.server->address());
  std::fflush(stdout);

  std::atomic<bool> loaded = false;
  std::thread loader([&] {
    runtime = StartRuntime(flags.runtime);
    loaded = true;
  });
  while (!loaded) {
    // Nothing has been accepted yet.
    if (signals.Wait() != 0) std::_Exit(0);
  }
  loader.join();
  if (!runtime.ok()) {
    frontend->Fail(runtime.status());
    return runtime.status();
  }
  frontend->Start(*runtime->engine, *runtime->loop);
  spdlog::info("ready: serving {} at {}{}", frontend->model().name, server->address(),
               http.server == nullptr ? "" : fmt::format(" and http://{}", http.server->address()));

  int signal = 0;
  while ((signal = signals.Wait()) == 0) {
  }
  spdlog::info("{}: draining, {} requests are open", signal == SIGTERM ? "SIGTERM" : "SIGINT",
               frontend->open_streams());
  const bool drained = Drain(*frontend, signals, flags.drain_timeout_s);
  const absl::Duration grace = drained ? absl::Seconds(1) : absl::ZeroDuration();
  server->Shutdown(grace);
  if (http.server != nullptr) http.server->Shutdown(grace);
  frontend->Stop();
  runtime->loop.reset();
  spdlog::info("stopped");
  return absl::OkStatus();
}

absl::Status StreamAnswer(const DemoFlags& flags, const std::string& address) {
  const auto channel = grpc::CreateChannel(address, grpc::InsecureChannelCredentials());
  const auto stub = v1::InferenceService::NewStub(channel);
  grpc::ClientContext context;
  v1::GenerateRequest request;
  request.set_text(flags.prompt);
  request.mutable_sampling()->set_max_tokens(flags.max_tokens);
  request.mutable_sampling()->set_temperature(flags.temperature);
  request.mutable_sampling()->set_top_p(flags.top_p);
  if (flags.seed.has_value()) request.mutable_sampling()->set_seed(*flags.seed);
  const auto reader = stub->Generate(&context, request);
  fmt::print("\n{}", flags.prompt);
  v1::GenerateResponse response;
  while (reader->Read(&response)) {
    if (response.has_delta()) {
      fmt::print("{}", response.delta().text());
      std::fflush(stdout);
    } else if (response.has_completed()) {
      const v1::Usage& usage = response.completed().usage();
      const v1::Timing& t = response.completed().timing();
      const double tpot_ms =
          usage.output_tokens() > 1 ? static_cast<double>(t.decode_ns()) * 1e-6 / (usage.output_tokens() - 1) : 0;
      fmt::print("\n\n");
      std::fflush(stdout);
      fmt::print(stderr, "{} prompt + {} output tokens  TTFT {:.1f} ms  TPOT {:.2f} ms  output {:.1f} tokens/s\n",
                 usage.prompt_tokens(), usage.output_tokens(), static_cast<double>(t.time_to_first_token_ns()) * 1e-6,
                 tpot_ms, t.total_ns() > 0 ? usage.output_tokens() / (static_cast<double>(t.total_ns()) * 1e-9) : 0);
    }
  }
  const grpc::Status status = reader->Finish();
  if (status.ok()) return absl::OkStatus();
  return Annotate(absl::Status(static_cast<absl::StatusCode>(status.error_code()), status.error_message()), "Generate");
}

absl::Status Demo(const DemoFlags& flags) {
  ASSIGN_OR_RETURN(const auto frontend, CreateFrontend(flags.runtime, FrontendOptions{}));
  ASSIGN_OR_RETURN(const auto server, GrpcServer::Create("127.0.0.1:0", *frontend));
  ASSIGN_OR_RETURN(Runtime runtime, StartRuntime(flags.runtime));
  frontend->Start(*runtime.engine, *runtime.loop);
  spdlog::set_level(spdlog::level::warn);  // the terminal belongs to the story
  const EngineInfo& info = runtime.engine->Info();
  fmt::print(stderr, "{}: {} experts on {} ranks, served over gRPC at {}\n", info.model_name, info.num_experts,
             info.num_ranks, server->address());
  const absl::Status status = StreamAnswer(flags, server->address());
  server->Shutdown(absl::ZeroDuration());
  frontend->Stop();
  runtime.loop.reset();
  if (status.ok()) {
    fmt::print(stderr,
               "\nWhat to try next:\n"
               "  ./soloist.sh demo --model={0} --ranks=4 --prompt='The dragon said'   another prompt, other ranks\n"
               "  ./soloist.sh serve --model={0} --ranks={1}   a server, until Ctrl-C\n"
               "  ./soloist.sh generate --help   without a server, also many prompts from a file\n"
               "  ./soloist.sh inspect --model={0} --memory=80   what fits where\n",
               flags.runtime.engine.model_dir, info.num_ranks);
  }
  return status;
}

}  // namespace

void AddServe(CLI::App& app, int& exit_code) {
  auto flags = std::make_shared<ServeFlags>();
  ServerLimits& limits = flags->frontend.limits;
  CLI::App* sub = app.add_subcommand("serve", "serve a model over gRPC and HTTP until SIGTERM or Ctrl-C");
  flags->runtime.AddTo(*sub);
  flags->profile_every = sub->get_option("--profile-every");
  sub->add_option("--grpc-address", flags->grpc_address, "HOST:PORT to listen at; port 0: any free one")
      ->capture_default_str();
  flags->http.AddTo(*sub);
  sub->add_option("--drain-timeout", flags->drain_timeout_s,
                  "seconds that running requests may take after SIGTERM; a second signal stops at once")
      ->check(CLI::NonNegativeNumber)
      ->capture_default_str();
  sub->add_option("--server-threads", flags->frontend.num_threads, "threads that turn tokens into text and messages")
      ->check(CLI::Range(1, 256))
      ->capture_default_str();
  sub->add_option("--stall-after", flags->stall_after_s, "seconds after which a rank's unfinished step is unhealthy")
      ->check(CLI::PositiveNumber)
      ->capture_default_str();
  sub->add_flag("!--no-request-log", flags->frontend.log_requests, "no line in the log for each request that ends");
  sub->add_option("--max-streams", limits.max_streams, "requests open at a time; more are refused")
      ->check(CLI::PositiveNumber)
      ->capture_default_str();
  sub->add_option("--max-message-bytes", limits.max_message_bytes, "size of a request message")
      ->check(CLI::Range(int64_t{1} << 10, int64_t{1} << 30))
      ->capture_default_str();
  sub->add_option("--max-prompt-bytes", limits.max_prompt_bytes, "size of a text prompt")
      ->check(CLI::PositiveNumber)
      ->capture_default_str();
  sub->add_option("--max-buffered-tokens", limits.max_buffered_tokens,
                  "tokens that a slow reader may leave unread before its request is cancelled")
      ->check(CLI::PositiveNumber)
      ->capture_default_str();
  sub->add_flag("--allow-logits", limits.allow_logits, "requests may ask for raw logits (large answers)");
  AddCheckFlags(*sub, flags->check_flags);
  sub->callback([flags, &exit_code] {
    exit_code = Report(flags->check_flags ? flags->runtime.cluster.IsCluster().status() : Serve(*flags));
  });
}

void AddDemo(CLI::App& app, int& exit_code) {
  auto flags = std::make_shared<DemoFlags>();
  CLI::App* sub = app.add_subcommand("demo", "start a server, send it a prompt over gRPC, stream the answer, stop");
  flags->runtime.AddTo(*sub);
  sub->add_option("--prompt", flags->prompt, "text")->capture_default_str();
  sub->add_option("--max-tokens", flags->max_tokens, "new tokens at most")
      ->check(CLI::PositiveNumber)
      ->capture_default_str();
  sub->add_option("--temperature", flags->temperature, "0: greedy")
      ->check(CLI::NonNegativeNumber)
      ->capture_default_str();
  sub->add_option("--top-p", flags->top_p, "(0, 1]")->capture_default_str();
  sub->add_option("--seed", flags->seed, "the same seed gives the same text; default: a random one");
  sub->callback([flags, &exit_code] { exit_code = Report(Demo(*flags)); });
}

}  // namespace soloist::cli
