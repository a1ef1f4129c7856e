// Negative log-likelihood of 20,000 tokens (tests/gpu/data/heldout.jsonl, see make_heldout.cc) on CUDA against the CPU
// backend's in float32: through prefill chunks, decode graphs and eager decodes, with bf16 and FP8 caches.
#include <cmath>
#include <cstdio>
#include <fstream>
#include <string>
#include <vector>

#include "gtest/gtest.h"
#include "nlohmann/json.hpp"
#include "tests/gpu/forced_worker.h"
#include "tests/gpu/parity_flags.h"

namespace soloist {
namespace {

struct Heldout {
  std::vector<std::vector<int32_t>> texts;
  std::vector<int32_t> first;  // first token that counts
  std::vector<double> nll;
  double total = 0;
  int64_t tokens = 0;
};

const Heldout& TheHeldout() {
  static const Heldout heldout = [] {
    Heldout h;
    std::ifstream file(Flags().data);
    for (std::string line; std::getline(file, line);) {
      const auto text = nlohmann::json::parse(line);
      h.texts.push_back(text["tokens"]);
      h.first.push_back(text["first"]);
      h.nll.push_back(text["nll"]);
      h.total += h.nll.back();
      h.tokens += std::ssize(h.texts.back()) - h.first.back();
    }
    EXPECT_EQ(h.tokens, 20000) << Flags().data << ": run from the repository's root";
    return h;
  }();
  return heldout;
}

using Logprobs = std::vector<std::vector<float>>;

// Runs the texts (the decoded part token by token) and compares their likelihood.
Logprobs Measure(const std::string& name, const ForcedOptions& options, bool decode, double bound,
                 int32_t chunk = 256) {
  const Heldout& h = TheHeldout();
  const auto worker = ForcedWorker::Load(Flags().model_dir, options);
  if (worker == nullptr) return {};
  const std::vector<int32_t> never(h.texts.size(), 1 << 30);
  Logprobs logprobs = worker->Logprobs(h.texts, h.first, decode ? h.first : never, chunk);
  double total = 0, worst_text = 0;
  for (size_t t = 0; t < h.texts.size(); ++t) {
    double nll = 0;
    EXPECT_EQ(std::ssize(logprobs[t]), std::ssize(h.texts[t]) - h.first[t]) << name;
    for (const float l : logprobs[t]) nll -= l;
    worst_text = std::max(worst_text, std::abs(nll / h.nll[t] - 1));
    total += nll;
  }
  const double error = total / h.total - 1;
  std::printf("  %-34s %.5f nats per token, float32 %.5f: %+.3f%% (bound %.1f%%), worst of %zu texts %.2f%%\n",
              name.c_str(), total / static_cast<double>(h.tokens), h.total / static_cast<double>(h.tokens), 100 * error,
              100 * bound, h.texts.size(), 100 * worst_text);
  EXPECT_LE(std::abs(error), bound) << name;
  return logprobs;
}

// How two runs differ, token by token; the number of those that are not the same bits.
int64_t Differences(const char* name, const Logprobs& a, const Logprobs& b) {
  int64_t other = 0, count = 0;
  double square = 0, worst = 0;
  EXPECT_EQ(a.size(), b.size());
  for (size_t t = 0; t < std::min(a.size(), b.size()); ++t) {
    for (size_t i = 0; i < std::min(a[t].size(), b[t].size()); ++i) {
      const double difference = std::abs(a[t][i] - b[t][i]);
      other += a[t][i] != b[t][i];
      square += difference * difference;
      worst = std::max(worst, difference);
      ++count;
    }
  }
  std::printf("  %s: %lld of %lld log-probabilities have other bits; difference %.1e rms, %.1e worst\n", name,
              static_cast<long long>(other), static_cast<long long>(count),
              std::sqrt(square / static_cast<double>(std::max<int64_t>(count, 1))), worst);
  return other;
}

ForcedOptions Options(bool deterministic, DType kv_dtype, bool graphs = true) {
  return {.device = {.kind = Flags().device, .deterministic = deterministic}, .kv_dtype = kv_dtype, .graphs = graphs};
}

TEST(LikelihoodTest, ChunksAndDecodes) {
  const auto chunks = Measure("bf16, chunks", Options(false, DType::kBF16), false, 2e-3);
  const auto graphs = Measure("bf16, decode graphs", Options(false, DType::kBF16), true, 2e-3);
  const auto eager = Measure("bf16, decodes without graphs", Options(false, DType::kBF16, false), true, 2e-3);
  Differences("chunks and decodes", chunks, graphs);
  // A graph's rows are padded to its bucket, for which the library may have another algorithm.
  Differences("graphs and eager decodes", graphs, eager);
}
TEST(LikelihoodTest, Deterministic) {
  const auto chunks = Measure("deterministic, chunks", Options(true, DType::kBF16), false, 2e-3);
  const auto small = Measure("deterministic, chunks of 37 in all", Options(true, DType::kBF16), false, 2e-3, 37);
  const auto graphs = Measure("deterministic, decode graphs", Options(true, DType::kBF16), true, 2e-3);
  EXPECT_EQ(Differences("deterministic: large and small chunks", chunks, small), 0);
  EXPECT_EQ(Differences("deterministic: chunks and decodes", chunks, graphs), 0);
}
TEST(LikelihoodTest, Fp8Cache) {
  if (Flags().device != "cuda") GTEST_SKIP() << "the CPU has no FP8 cache";
  const auto chunks = Measure("FP8 cache, chunks", Options(false, DType::kF8E4M3), false, 2e-2);
  const auto graphs = Measure("FP8 cache, decode graphs", Options(false, DType::kF8E4M3), true, 2e-2);
  Differences("FP8: chunks and decodes", chunks, graphs);
}

}  // namespace
}  // namespace soloist
