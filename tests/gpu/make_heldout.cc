// Makes tests/gpu/data/heldout.jsonl: texts that the bundled model wrote at temperature 1, on the CPU backend with
// fixed seeds, each with its negative log-likelihood there in float32. Run from the repository's root:
//   bazel run //tests/gpu:make_heldout -- $PWD/models/tiny $PWD/tests/gpu/data/heldout.jsonl
#include <cstdio>
#include <fstream>
#include <numeric>
#include <string>
#include <vector>

#include "nlohmann/json.hpp"
#include "tests/gpu/forced_worker.h"
#include "tests/parity/engine_harness.h"

namespace soloist {
namespace {

constexpr int kTexts = 40, kTokens = 500;

int Make(const std::string& model_dir, const std::string& path) {
  std::vector<std::vector<int32_t>> prompts;
  std::ifstream goldens(model_dir + "/golden/prompts.jsonl");
  for (std::string line; std::getline(goldens, line);) {
    const auto golden = nlohmann::json::parse(line);
    if (golden["ids"].size() <= 120) prompts.push_back(golden["ids"]);
  }
  if (prompts.empty()) {
    std::fprintf(stderr, "%s has no golden/prompts.jsonl\n", model_dir.c_str());
    return 1;
  }
  std::vector<Request> requests;
  for (int i = 0; i < kTexts; ++i) {
    Request request;
    request.id = std::to_string(i);
    request.prompt = prompts[i % prompts.size()];
    request.sampling = {
        .temperature = 1, .seed = 7000 + static_cast<uint64_t>(i), .max_tokens = kTokens, .ignore_eos = true};
    requests.push_back(std::move(request));
  }
  std::vector<std::vector<int32_t>> texts;
  std::vector<int32_t> first;
  {
    Harness harness({.model_dir = model_dir, .max_tokens_per_step = 512, .max_sequences = 64}, {});
    if (!harness.ok()) return 1;
    const auto outputs = harness.Run(requests);
    for (int i = 0; i < kTexts; ++i) {
      texts.push_back(requests[i].prompt);
      first.push_back(static_cast<int32_t>(texts[i].size()));
      texts[i].insert(texts[i].end(), outputs[i][0].tokens.begin(), outputs[i][0].tokens.end());
    }
  }
  const auto worker = ForcedWorker::Load(model_dir, {.kv_dtype = DType::kF32});
  if (worker == nullptr) return 1;
  const auto logprobs = worker->Logprobs(texts, first, std::vector<int32_t>(kTexts, 1 << 30), 256);
  std::ofstream out(path);
  double total = 0;
  for (int i = 0; i < kTexts; ++i) {
    const double nll = -std::accumulate(logprobs[i].begin(), logprobs[i].end(), 0.0);
    total += nll;
    out << nlohmann::json{{"first", first[i]}, {"nll", nll}, {"tokens", texts[i]}}.dump() << "\n";
  }
  std::printf("%d texts, %d tokens, %.5f nats per token\n", kTexts, kTexts * kTokens, total / (kTexts * kTokens));
  return out.good() ? 0 : 1;
}

}  // namespace
}  // namespace soloist

int main(int argc, char** argv) {
  if (argc != 3) {
    std::fprintf(stderr, "usage: make_heldout MODEL_FOLDER OUTPUT\n");
    return 2;
  }
  return soloist::Make(argv[1], argv[2]);
}
