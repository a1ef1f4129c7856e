// What counting costs: of a token, of an output that ends, and of a scrape on 16 ranks, 32 layers and 16 experts.
#include <algorithm>
#include <cstdio>
#include <functional>
#include <vector>

#include "base/clock.h"
#include "engine/simulated_engine.h"
#include "scheduler/step_loop.h"
#include "server/metrics/exporter.h"

namespace soloist {
namespace {

constexpr int kSamples = 21;

// Prints minimum, median and the 20th of 21 samples of the time per `count` runs of `work`.
void Measure(const char* what, int count, const std::function<void(int)>& work) {
  std::vector<double> ns;
  for (int sample = 0; sample < kSamples; ++sample) {
    const int64_t start = Clock::Real().NowNs();
    for (int i = 0; i < count; ++i) work(i);
    ns.push_back(static_cast<double>(Clock::Real().NowNs() - start) / count);
  }
  std::ranges::sort(ns);
  std::printf("%-28s min %10.1f  median %10.1f  p95 %10.1f ns\n", what, ns[0], ns[kSamples / 2], ns[kSamples - 2]);
}

int Run() {
  RequestMetrics metrics;
  Measure("token", 1'000'000, [&](int i) { metrics.NextToken(200'000 + i * 37 % 20'000'000); });
  FinishEvent event;
  event.reason = FinishReason::kLength;
  event.times = {1'000'000, 2'000'000, 30'000'000, 900'000'000};
  Measure("end of an output", 100'000, [&](int i) { metrics.Ended(event, 500'000, 1'000, 1 + i % 2'000); });

  SimulatedOptions simulated;
  simulated.num_homes = 16;
  simulated.num_layers = 32;
  simulated.limits = {.vocab_size = 1'000,
                      .max_model_len = 1'024,
                      .num_blocks = 64,
                      .block_size = 16,
                      .max_tokens = 64,
                      .max_sequences = 64};
  SimulatedEngine engine(simulated);
  auto loop = StepLoop::Create({}, engine, Clock::Real());
  auto tokenizer = Tokenizer::Load("models/tiny");
  if (!loop.ok() || !tokenizer.ok()) {
    std::fprintf(stderr, "%s %s\n", loop.status().ToString().c_str(), tokenizer.status().ToString().c_str());
    return 1;
  }
  {
    Frontend frontend({}, {.name = "model", .architecture = "", .eos_token_ids = {}, .defaults = {}},
                      *std::move(tokenizer), Clock::Real());
    frontend.Start(engine, **loop);
    size_t bytes = 0;
    for (const bool per_layer : {false, true}) {
      Measure(per_layer ? "scrape, per layer" : "scrape", 50,
              [&](int) { bytes = PrometheusText(frontend, {.per_layer = per_layer}).size(); });
      std::printf("%28s %zu bytes\n", "", bytes);
    }
    frontend.Stop();
  }
  return 0;
}

}  // namespace
}  // namespace soloist

int main() { return soloist::Run(); }
