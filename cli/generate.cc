// soloist generate: prompts through the whole engine in this process, streamed to the terminal or as JSON.
#include <condition_variable>
#include <cstdio>
#include <fstream>
#include <iostream>
#include <memory>
#include <mutex>
#include <optional>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "base/clock.h"
#include "base/status.h"
#include "cli/flags.h"
#include "nlohmann/json.hpp"
#include "server/tokenizer/tokenizer.h"

namespace soloist::cli {
namespace {

using Json = nlohmann::json;

struct GenerateFlags {
  EngineFlags runtime;
  std::string prompt;
  std::vector<int32_t> prompt_token_ids;
  std::string input;
  SamplingParams sampling;
  std::optional<uint64_t> seed;
  bool json = false;
};

struct Input {
  std::vector<int32_t> prompt;
  SamplingParams sampling;
};

// Collects one request's tokens; streams its text to stdout if asked.
class CollectingSink final : public TokenSink {
 public:
  CollectingSink(const Tokenizer& tokenizer, bool stream) : decoder_(tokenizer, true), stream_(stream) {}

  bool OnToken(TokenEvent event) override {
    std::lock_guard lock(mutex_);
    const std::string piece = decoder_.Push(event.token);
    text_ += piece;
    if (stream_) Print(piece);
    events_.push_back(std::move(event));
    return true;
  }
  void OnFinish(const FinishEvent& event) override {
    std::lock_guard lock(mutex_);
    const std::string rest = decoder_.Flush();
    text_ += rest;
    if (stream_) Print(rest + "\n");
    finish_ = event;
    done_.notify_all();
  }
  void Wait() {
    std::unique_lock lock(mutex_);
    done_.wait(lock, [this] { return finish_.reason != FinishReason::kNone; });
  }

  // After Wait.
  const std::vector<TokenEvent>& events() const { return events_; }
  const FinishEvent& finish() const { return finish_; }
  const std::string& text() const { return text_; }

 private:
  static void Print(const std::string& text) {
    std::fwrite(text.data(), 1, text.size(), stdout);
    std::fflush(stdout);
  }

  std::mutex mutex_;
  std::condition_variable done_;
  IncrementalDecoder decoder_;
  const bool stream_;
  std::vector<TokenEvent> events_;
  FinishEvent finish_;
  std::string text_;
};

// TTFT = first token - arrival; TPOT = (last - first) / (tokens - 1); milliseconds.
struct Times {
  double ttft_ms = 0;
  double tpot_ms = 0;
};
Times TimesOf(const CollectingSink& sink) {
  const RequestTimes& t = sink.finish().times;
  const auto n = static_cast<double>(sink.events().size());
  return {.ttft_ms = n > 0 ? static_cast<double>(t.first_token_ns - t.arrival_ns) * 1e-6 : 0,
          .tpot_ms = n > 1 ? static_cast<double>(t.last_token_ns - t.first_token_ns) * 1e-6 / (n - 1) : 0};
}

Json ToJson(const Input& input, const CollectingSink& sink) {
  Json tokens = Json::array(), logprobs = Json::array(), logits = Json::array();
  for (const TokenEvent& event : sink.events()) {
    tokens.push_back(event.token);
    if (input.sampling.num_top_logprobs >= 0) {
      Json top = Json::array();
      for (const auto& [token, logprob] : event.top_logprobs) top.push_back({{"token", token}, {"logprob", logprob}});
      logprobs.push_back({{"token", event.token}, {"logprob", event.logprob}, {"top", top}});
    }
    if (!event.logits.empty()) logits.push_back(event.logits);
  }
  const FinishEvent& finish = sink.finish();
  const Times times = TimesOf(sink);
  Json out = {{"prompt_token_ids", input.prompt},
              {"token_ids", tokens},
              {"text", sink.text()},
              {"finish_reason", FinishReasonName(finish.reason)},
              {"usage",
               {{"prompt_tokens", input.prompt.size()},
                {"completion_tokens", sink.events().size()},
                {"cached_prompt_tokens", finish.cached_prompt_tokens}}},
              {"times",
               {{"arrival_ns", finish.times.arrival_ns},
                {"first_scheduled_ns", finish.times.first_scheduled_ns},
                {"first_token_ns", finish.times.first_token_ns},
                {"last_token_ns", finish.times.last_token_ns},
                {"ttft_ms", times.ttft_ms},
                {"tpot_ms", times.tpot_ms}}}};
  if (input.sampling.num_top_logprobs >= 0) out["logprobs"] = logprobs;
  if (!logits.empty()) out["logits"] = logits;
  if (!finish.error.ok()) out["error"] = std::string(finish.error.message());
  return out;
}

template <typename T>
absl::Status Take(const Json& object, const char* key, T& value) {
  const auto it = object.find(key);
  if (it == object.end() || it->is_null()) return absl::OkStatus();
  if constexpr (std::is_same_v<T, bool>) {
    if (!it->is_boolean()) return InvalidArgument("{} is {}, expected true or false", key, it->dump());
  } else {
    if (!it->is_number()) return InvalidArgument("{} is {}, expected a number", key, it->dump());
  }
  value = it->get<T>();
  return absl::OkStatus();
}

// One line of --input: {"prompt": TEXT | "prompt_token_ids": [...], and any of the sampling flags with _ for -}.
absl::StatusOr<Input> ParseLine(const std::string& line, const Tokenizer& tokenizer, const SamplingParams& defaults) {
  const Json object = Json::parse(line, nullptr, /*allow_exceptions=*/false);
  if (!object.is_object()) return InvalidArgument("not a JSON object");
  Input input{.prompt = {}, .sampling = defaults};
  SamplingParams& s = input.sampling;
  if (object.contains("prompt_token_ids") && object["prompt_token_ids"].is_array()) {
    for (const Json& id : object["prompt_token_ids"]) {
      if (!id.is_number_integer()) return InvalidArgument("prompt_token_ids holds {}", id.dump());
      input.prompt.push_back(id.get<int32_t>());
    }
  } else if (object.contains("prompt") && object["prompt"].is_string()) {
    input.prompt = tokenizer.Encode(object["prompt"].get<std::string>());
  } else {
    return InvalidArgument("neither prompt (a string) nor prompt_token_ids (an array)");
  }
  RETURN_IF_ERROR(Take(object, "max_tokens", s.max_tokens));
  RETURN_IF_ERROR(Take(object, "min_tokens", s.min_tokens));
  RETURN_IF_ERROR(Take(object, "temperature", s.temperature));
  RETURN_IF_ERROR(Take(object, "top_p", s.top_p));
  RETURN_IF_ERROR(Take(object, "top_k", s.top_k));
  RETURN_IF_ERROR(Take(object, "min_p", s.min_p));
  RETURN_IF_ERROR(Take(object, "repetition_penalty", s.repetition_penalty));
  RETURN_IF_ERROR(Take(object, "presence_penalty", s.presence_penalty));
  RETURN_IF_ERROR(Take(object, "frequency_penalty", s.frequency_penalty));
  RETURN_IF_ERROR(Take(object, "seed", s.seed));
  RETURN_IF_ERROR(Take(object, "logprobs", s.num_top_logprobs));
  RETURN_IF_ERROR(Take(object, "ignore_eos", s.ignore_eos));
  return input;
}

absl::StatusOr<std::vector<Input>> ReadInputs(const GenerateFlags& flags, const Tokenizer& tokenizer) {
  std::vector<Input> inputs;
  if (!flags.input.empty()) {
    std::ifstream file(flags.input);
    if (!file) return NotFound("--input: cannot open '{}'", flags.input);
    std::string line;
    for (int number = 1; std::getline(file, line); ++number) {
      if (line.find_first_not_of(" \t\r") == std::string::npos) continue;
      auto input = ParseLine(line, tokenizer, flags.sampling);
      if (!input.ok()) return Annotate(input.status(), fmt::format("{}:{}", flags.input, number));
      inputs.push_back(*std::move(input));
    }
    return inputs;
  }
  Input input{.prompt = flags.prompt_token_ids, .sampling = flags.sampling};
  if (input.prompt.empty()) input.prompt = tokenizer.Encode(flags.prompt);
  inputs.push_back(std::move(input));
  return inputs;
}

absl::Status Generate(GenerateFlags flags) {
  ASSIGN_OR_RETURN(const auto tokenizer, Tokenizer::Load(flags.runtime.engine.model_dir));
  flags.sampling.seed = flags.seed.value_or(std::random_device{}());
  ASSIGN_OR_RETURN(const std::vector<Input> inputs, ReadInputs(flags, *tokenizer));
  ASSIGN_OR_RETURN(Runtime runtime, StartRuntime(flags.runtime));

  const bool many = !flags.input.empty();
  const int64_t start_ns = Clock::Real().NowNs();
  std::vector<std::shared_ptr<CollectingSink>> sinks;
  for (size_t i = 0; i < inputs.size(); ++i) {
    sinks.push_back(std::make_shared<CollectingSink>(*tokenizer, !flags.json && !many));
    Request request;
    request.id = fmt::format("generate-{}", i);
    request.prompt = inputs[i].prompt;
    request.sampling = inputs[i].sampling;
    request.sink = sinks.back();
    RETURN_IF_ERROR(runtime.loop->Add(std::move(request)));
  }
  size_t output_tokens = 0, prompt_tokens = 0;
  absl::Status failed;
  for (size_t i = 0; i < sinks.size(); ++i) {
    sinks[i]->Wait();
    output_tokens += sinks[i]->events().size();
    prompt_tokens += inputs[i].prompt.size();
    if (flags.json) {
      std::cout << ToJson(inputs[i], *sinks[i]).dump(-1, ' ', false, Json::error_handler_t::replace) << "\n"
                << std::flush;
    } else if (many) {
      std::cout << fmt::format("--- {} ({})\n{}", i + 1, FinishReasonName(sinks[i]->finish().reason), sinks[i]->text())
                << "\n"
                << std::flush;
    }
    failed.Update(sinks[i]->finish().error);
  }
  const double seconds = static_cast<double>(Clock::Real().NowNs() - start_ns) * 1e-9;
  const Times times = TimesOf(*sinks.front());
  if (sinks.size() == 1) {
    fmt::print(stderr, "{} prompt + {} output tokens  TTFT {:.1f} ms  TPOT {:.2f} ms  output {:.1f} tokens/s\n",
               prompt_tokens, output_tokens, times.ttft_ms, times.tpot_ms,
               static_cast<double>(output_tokens) / seconds);
  } else {
    fmt::print(stderr, "{} requests  {} prompt + {} output tokens  {:.2f} s  output {:.1f} tokens/s\n", sinks.size(),
               prompt_tokens, output_tokens, seconds, static_cast<double>(output_tokens) / seconds);
  }
  return failed;
}

}  // namespace

void AddGenerate(CLI::App& app, int& exit_code) {
  auto flags = std::make_shared<GenerateFlags>();
  flags->sampling.max_tokens = 128;
  SamplingParams& s = flags->sampling;
  CLI::App* sub = app.add_subcommand("generate", "continue a prompt in this process, without a server");
  flags->runtime.AddTo(*sub);
  auto* source = sub->add_option_group("prompt", "exactly one of");
  source->add_option("--prompt", flags->prompt, "text");
  source->add_option("--prompt-token-ids", flags->prompt_token_ids, "token ids: 1,2,3")->delimiter(',');
  source->add_option(
      "--input", flags->input,
      "JSON lines, run as one batch: prompt or prompt_token_ids, and sampling fields such as max_tokens");
  source->require_option(1);
  sub->add_option("--max-tokens", s.max_tokens, "new tokens at most")
      ->check(CLI::PositiveNumber)
      ->capture_default_str();
  sub->add_option("--min-tokens", s.min_tokens, "no end before that many")
      ->check(CLI::NonNegativeNumber)
      ->capture_default_str();
  sub->add_option("--temperature", s.temperature, "0: greedy")->check(CLI::NonNegativeNumber)->capture_default_str();
  sub->add_option("--top-p", s.top_p, "(0, 1]")->capture_default_str();
  sub->add_option("--top-k", s.top_k, "0: off")->check(CLI::NonNegativeNumber)->capture_default_str();
  sub->add_option("--min-p", s.min_p, "[0, 1]")->check(CLI::Range(0.0, 1.0))->capture_default_str();
  sub->add_option("--repetition-penalty", s.repetition_penalty, "> 0; 1: off")->capture_default_str();
  sub->add_option("--presence-penalty", s.presence_penalty, "[-2, 2]")
      ->check(CLI::Range(-2.0, 2.0))
      ->capture_default_str();
  sub->add_option("--frequency-penalty", s.frequency_penalty, "[-2, 2]")
      ->check(CLI::Range(-2.0, 2.0))
      ->capture_default_str();
  sub->add_option("--seed", flags->seed, "the same seed gives the same text; default: a random one");
  sub->add_option("--logprobs", s.num_top_logprobs, "with --json: log-probabilities of the chosen and the top n tokens")
      ->check(CLI::Range(0, kMaxTopLogprobs));
  sub->add_flag("--ignore-eos", s.ignore_eos, "go on after end tokens");
  sub->add_flag("--return-logits", s.return_logits, "with --json: the raw logits of every token");
  sub->add_flag("--json", flags->json, "one JSON object per request on stdout");
  sub->callback([flags, &exit_code] { exit_code = Report(Generate(*flags)); });
}

}  // namespace soloist::cli
