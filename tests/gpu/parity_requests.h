// Requests for the parity tests, and how two runs of them compare.
#ifndef SOLOIST_TESTS_GPU_PARITY_REQUESTS_H_
#define SOLOIST_TESTS_GPU_PARITY_REQUESTS_H_

#include <cstdint>
#include <string>
#include <vector>

#include "engine/worker/in_process_engine.h"
#include "nlohmann/json.hpp"
#include "scheduler/request.h"
#include "tests/gpu/forced_worker.h"
#include "tests/parity/engine_harness.h"

namespace soloist {

// The cases of golden/prompts.jsonl, see the model's MODEL_CARD.md.
std::vector<nlohmann::json> LoadGoldens();

// One step of one golden, by teacher forcing: this device in bf16 against the CPU backend in float32 and the golden.
struct GoldenStep {
  size_t golden = 0;
  int step = 0;
  double error = 0;           // relative, of the reference's five best logits
  double gap = 0;             // between the reference's best two
  double gap_error = 0;       // of that difference
  bool same_best = false;     // the best token is the golden's
  bool same_experts = false;  // as in float32, in all layers, at this position and at all before it
};
std::vector<GoldenStep> MeasureGoldens(const ForcedOptions& options, int32_t chunk);

// Two logits nearer than that may change places in bf16: six times the root mean square of GoldenStep::gap_error over
// the steps with the same experts. Measured once.
double NearTie();

// A request for log-probabilities of the two most likely tokens at each step.
Request GreedyRequest(const std::string& id, std::vector<int32_t> prompt, int32_t max_tokens);

// `count` mixed requests: greedy and sampled, penalties, short and long prompts, shared prefixes; all with
// log-probabilities of the two most likely tokens.
std::vector<Request> MixedRequests(int count, int32_t vocab_size);

// Where two runs of the same requests part.
struct Comparison {
  int64_t requests = 0;
  int64_t tokens = 0;         // compared: up to where a request's runs part
  int64_t greedy_parted = 0;  // greedy requests that part
  int64_t greedy_far = 0;     // of these: with a gap wider than NearTie(): another choice of experts, at best
  int64_t sampled_parted = 0;
  double widest_gap = 0;       // of greedy ones: log-probability of the best less the second, where they part
  int64_t other_logprobs = 0;  // tokens whose log-probabilities are not the same bits
};
Comparison Compare(const std::vector<Request>& requests, const std::vector<std::vector<Output>>& expected,
                   const std::vector<std::vector<Output>>& actual, const std::string& name);

}  // namespace soloist

#endif  // SOLOIST_TESTS_GPU_PARITY_REQUESTS_H_
