#include "tests/gpu/parity_requests.h"

#include <algorithm>
#include <cmath>
#include <fstream>
#include <random>

#include "tests/gpu/parity_flags.h"

namespace soloist {

std::vector<nlohmann::json> LoadGoldens() {
  std::vector<nlohmann::json> cases;
  std::ifstream file(Flags().model_dir + "/golden/prompts.jsonl");
  for (std::string line; std::getline(file, line);) cases.push_back(nlohmann::json::parse(line));
  EXPECT_EQ(cases.size(), 24u) << "goldens in " << Flags().model_dir << ": run from the repository's root";
  return cases;
}

namespace {

std::vector<int32_t> TokensOf(const nlohmann::json& golden) {
  auto tokens = golden["ids"].get<std::vector<int32_t>>();
  for (const int32_t id : golden["greedy"]) tokens.push_back(id);
  return tokens;
}

// The goldens on the CPU in float32.
const std::vector<Forced>& CpuGoldens() {
  static const std::vector<Forced> all = [] {
    std::vector<Forced> forced;
    const auto worker = ForcedWorker::Load(Flags().model_dir, {.kv_dtype = DType::kF32});
    for (const auto& golden : LoadGoldens()) {
      forced.push_back(worker != nullptr ? worker->Logits(TokensOf(golden), 256) : Forced());
    }
    return forced;
  }();
  return all;
}

}  // namespace

std::vector<GoldenStep> MeasureGoldens(const ForcedOptions& options, int32_t chunk) {
  std::vector<GoldenStep> steps;
  const auto worker = ForcedWorker::Load(Flags().model_dir, options);
  if (worker == nullptr) return steps;
  const auto goldens = LoadGoldens();
  const int64_t vocab = worker->config().vocab_size;
  for (size_t g = 0; g < goldens.size(); ++g) {
    const auto& golden = goldens[g];
    const auto tokens = TokensOf(golden);
    const Forced forced = worker->Logits(tokens, chunk);
    EXPECT_EQ(std::ssize(forced.logits), std::ssize(tokens) * vocab);
    if (std::ssize(forced.logits) != std::ssize(tokens) * vocab) return {};
    EXPECT_TRUE(std::ranges::all_of(forced.logits, [](float x) { return std::isfinite(x); })) << golden["name"];
    int64_t same = 0;  // leading positions with the same experts
    while (same < std::ssize(tokens) &&
           SameExperts(worker->config(), forced, CpuGoldens()[g], same, std::ssize(tokens))) {
      ++same;
    }
    for (size_t step = 0; step < golden["greedy"].size(); ++step) {
      const auto position = static_cast<int64_t>(golden["ids"].size() - 1 + step);
      const float* logits = &forced.logits[position * vocab];
      const auto ids = golden["top5_ids"][step].get<std::vector<int32_t>>();
      const auto reference = golden["top5_logits"][step].get<std::vector<double>>();
      double difference = 0, norm = 0;
      for (size_t i = 0; i < ids.size(); ++i) {
        difference += std::pow(logits[ids[i]] - reference[i], 2);
        norm += std::pow(reference[i], 2);
      }
      const double gap = reference[0] - reference[1];
      steps.push_back({.golden = g,
                       .step = static_cast<int>(step),
                       .error = std::sqrt(difference / norm),
                       .gap = gap,
                       .gap_error = logits[ids[0]] - logits[ids[1]] - gap,
                       .same_best = std::max_element(logits, logits + vocab) - logits == golden["greedy"][step],
                       .same_experts = position < same});
    }
  }
  return steps;
}

double NearTie() {
  static const double near_tie = [] {
    double square = 0;
    int64_t count = 0;
    for (const GoldenStep& step : MeasureGoldens({.device = {.kind = Flags().device}}, 256)) {
      if (!step.same_experts) continue;
      square += step.gap_error * step.gap_error;
      ++count;
    }
    return std::max(1e-4, 6 * std::sqrt(square / static_cast<double>(std::max<int64_t>(count, 1))));
  }();
  return near_tie;
}

Request GreedyRequest(const std::string& id, std::vector<int32_t> prompt, int32_t max_tokens) {
  Request request;
  request.id = id;
  request.prompt = std::move(prompt);
  request.sampling.temperature = 0;
  request.sampling.max_tokens = max_tokens;
  request.sampling.ignore_eos = true;
  request.sampling.num_top_logprobs = 2;
  return request;
}

std::vector<Request> MixedRequests(int count, int32_t vocab_size) {
  std::mt19937 random(7);
  const auto token = [&] { return static_cast<int32_t>(random() % static_cast<uint32_t>(vocab_size)); };
  const auto goldens = LoadGoldens();
  std::vector<int32_t> shared(150);
  for (int32_t& id : shared) id = token();
  std::vector<Request> requests;
  for (int i = 0; i < count; ++i) {
    std::vector<int32_t> prompt;
    if (i % 2 == 0) {  // text that the model knows
      prompt = goldens[random() % goldens.size()]["ids"].get<std::vector<int32_t>>();
    } else {
      if (i % 4 == 1) prompt = shared;
      const int own = i % 8 == 3 ? 300 : 1 + static_cast<int>(random() % 60);
      for (int t = 0; t < own; ++t) prompt.push_back(token());
    }
    Request request =
        GreedyRequest("r" + std::to_string(i), std::move(prompt), 8 + static_cast<int32_t>(random() % 40));
    SamplingParams& s = request.sampling;
    if (i % 4 >= 2) {
      s.temperature = 0.9f;
      s.seed = 1000 + static_cast<uint64_t>(i);
      if (i % 3 == 0) s.top_k = 40, s.top_p = 0.9f, s.min_p = 0.01f;
    }
    if (i % 8 == 7) s.repetition_penalty = 1.3f, s.presence_penalty = 0.5f, s.frequency_penalty = 0.25f;
    requests.push_back(std::move(request));
  }
  return requests;
}

Comparison Compare(const std::vector<Request>& requests, const std::vector<std::vector<Output>>& expected,
                   const std::vector<std::vector<Output>>& actual, const std::string& name) {
  Comparison c;
  EXPECT_EQ(expected.size(), requests.size()) << name;
  EXPECT_EQ(actual.size(), requests.size()) << name;
  if (expected.size() != requests.size() || actual.size() != requests.size()) return c;
  for (size_t r = 0; r < requests.size(); ++r) {
    const Output& a = expected[r][0];
    const Output& b = actual[r][0];
    EXPECT_EQ(static_cast<int>(b.tokens.size()), requests[r].sampling.max_tokens) << name << " request " << r;
    ++c.requests;
    for (size_t step = 0; step < std::min(a.tokens.size(), b.tokens.size()); ++step) {
      ++c.tokens;
      c.other_logprobs += a.top[step] != b.top[step];
      if (a.tokens[step] == b.tokens[step]) continue;
      if (requests[r].sampling.temperature == 0) {
        ++c.greedy_parted;
        const double gap = a.top[step][0].second - a.top[step][1].second;
        // Penalties move logits apart or together by more than that; the raw gap says nothing then.
        if (requests[r].sampling.repetition_penalty == 1) {
          c.widest_gap = std::max(c.widest_gap, gap);
          c.greedy_far += gap > NearTie();
        }
        std::printf("    %s: request %zu parts at token %zu: %d and %d, gap %.4f\n", name.c_str(), r, step,
                    a.tokens[step], b.tokens[step], gap);
      } else {
        ++c.sampled_parted;
      }
      break;
    }
  }
  std::printf(
      "  %s: %lld requests, %lld tokens compared; %lld greedy (widest gap %.4f) and %lld sampled requests part; "
      "log-probabilities of %lld tokens have other bits\n",
      name.c_str(), static_cast<long long>(c.requests), static_cast<long long>(c.tokens),
      static_cast<long long>(c.greedy_parted), c.widest_gap, static_cast<long long>(c.sampled_parted),
      static_cast<long long>(c.other_logprobs));
  return c;
}

}  // namespace soloist
