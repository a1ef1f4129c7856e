// The exposition over a front end on a simulated engine: what it counts, and that docs/metrics.md names all of it.
#include "server/metrics/exporter.h"

#include <algorithm>
#include <condition_variable>
#include <fstream>
#include <map>
#include <memory>
#include <mutex>
#include <numeric>
#include <set>
#include <sstream>
#include <string>
#include <string_view>

#include "engine/simulated_engine.h"
#include "gtest/gtest.h"
#include "nlohmann/json.hpp"
#include "server/load_report.h"
#include "tests/scheduler/testing.h"

namespace soloist {
namespace {

// "name{labels}" -> value, of every sample.
std::map<std::string, double> Samples(const std::string& text) {
  std::map<std::string, double> samples;
  std::istringstream lines(text);
  for (std::string line; std::getline(lines, line);) {
    if (line.empty() || line[0] == '#') continue;
    const size_t space = line.rfind(' ');
    const bool inserted = samples.emplace(line.substr(0, space), std::stod(line.substr(space + 1))).second;
    EXPECT_TRUE(inserted) << "twice: " << line;
  }
  return samples;
}

std::set<std::string> FamilyNames(const std::string& text) {
  std::set<std::string> names;
  std::istringstream lines(text);
  for (std::string line; std::getline(lines, line);) {
    if (!line.starts_with("# TYPE ")) continue;
    EXPECT_TRUE(names.insert(line.substr(7, line.rfind(' ') - 7)).second) << "twice: " << line;
  }
  return names;
}

class ExporterTest : public testing::Test {
 protected:
  ExporterTest()
      : frontend_(FrontendOptions{},
                  ModelDescription{.name = "model", .architecture = "", .eos_token_ids = {}, .defaults = {}},
                  *Tokenizer::Load("models/tiny"), Clock::Real()) {}
  ~ExporterTest() override {
    frontend_.Stop();
    loop_.reset();
  }
  void Start() {
    SimulatedOptions simulated;
    simulated.num_homes = 2;
    simulated.limits = TestLimits(64, 4);
    engine_ = std::make_unique<SimulatedEngine>(simulated);
    loop_ = *StepLoop::Create({}, *engine_, Clock::Real());
    frontend_.Start(*engine_, *loop_);
  }
  // Runs one request to its end.
  void Generate(int32_t prompt_tokens, int32_t max_tokens, int32_t n) {
    GenerationRequest request;
    request.prompt = std::vector<int32_t>(prompt_tokens, 5);
    request.max_tokens = max_tokens;
    request.n = n;
    request.ignore_eos = true;
    std::mutex mutex;
    std::condition_variable changed;
    std::shared_ptr<OutputStream> stream;
    bool refused = false;
    frontend_.Generate(request, {.accepted =
                                     [&](std::shared_ptr<OutputStream> accepted, uint64_t) {
                                       const std::lock_guard lock(mutex);
                                       stream = std::move(accepted);
                                       changed.notify_all();
                                     },
                                 .refused =
                                     [&](const absl::Status&) {
                                       const std::lock_guard lock(mutex);
                                       refused = true;
                                       changed.notify_all();
                                     },
                                 .ready =
                                     [&] {
                                       const std::lock_guard lock(mutex);
                                       changed.notify_all();
                                     }});
    std::unique_lock lock(mutex);
    for (bool ended = false; !ended && !refused;) {
      changed.wait_for(lock, std::chrono::milliseconds(20));
      if (stream == nullptr) continue;
      stream->Process();
      while (auto event = stream->Next()) ended = ended || std::holds_alternative<RequestEnd>(*event);
    }
    if (stream != nullptr) frontend_.Closed(stream->options().request_id);
    lock.unlock();
    if (loop_ != nullptr) {
      ASSERT_TRUE(loop_->AwaitIdle(absl::Seconds(20)).ok());
    }
  }

  std::unique_ptr<SimulatedEngine> engine_;
  std::unique_ptr<StepLoop> loop_;
  Frontend frontend_;
};

TEST_F(ExporterTest, CountsRequestsTokensAndTimes) {
  Start();
  Generate(7, 5, 1);
  Generate(3, 4, 2);
  Generate(3, 100'000, 1);  // longer than the model takes
  auto samples = Samples(PrometheusText(frontend_, {}));
  const auto value = [&samples](const std::string& name, const std::string& labels = "") {
    const std::string key = "soloist:" + name + "{model_name=\"model\"" + labels + "}";
    EXPECT_TRUE(samples.contains(key)) << key;
    return samples[key];
  };
  EXPECT_EQ(value("prompt_tokens_total"), 10);
  EXPECT_EQ(value("generation_tokens_total"), 13);
  EXPECT_EQ(value("request_success_total", ",finished_reason=\"length\""), 3);
  EXPECT_EQ(value("request_success_total", ",finished_reason=\"abort\""), 0);
  EXPECT_EQ(value("requests_refused_total", ",code=\"INVALID_ARGUMENT\""), 1);
  EXPECT_EQ(value("time_to_first_token_seconds_count"), 3);
  EXPECT_EQ(value("inter_token_latency_seconds_count"), 13 - 3);
  EXPECT_EQ(value("e2e_request_latency_seconds_count"), 3);
  EXPECT_EQ(value("e2e_request_latency_seconds_bucket", ",le=\"+Inf\""), 3);
  EXPECT_EQ(value("request_generation_tokens_sum"), 13);
  EXPECT_EQ(value("request_generation_tokens_bucket", ",le=\"2\""), 0);
  EXPECT_EQ(value("request_generation_tokens_bucket", ",le=\"5\""), 3);
  EXPECT_EQ(value("num_requests_running"), 0);
  EXPECT_EQ(value("kv_cache_usage_perc"), 0);
  EXPECT_EQ(value("open_streams"), 0);
  EXPECT_EQ(value("state", ",state=\"ready\""), 1);
  EXPECT_EQ(value("state", ",state=\"degraded\""), 0);
  EXPECT_EQ(value("rank_up", ",rank=\"1\""), 1);
  // The parts of a request's time are its time.
  EXPECT_NEAR(value("request_queue_time_seconds_sum") + value("request_prefill_time_seconds_sum") +
                  value("request_decode_time_seconds_sum"),
              value("e2e_request_latency_seconds_sum"), 1e-9);
}

TEST_F(ExporterTest, PerLayerIsAsked) {
  Start();
  Generate(7, 5, 1);
  const int experts = engine_->Info().num_experts, layers = engine_->Info().num_layers;
  const auto count = [this](bool per_layer, double& sum) {
    int found = 0;
    sum = 0;
    for (const auto& [key, value] : Samples(PrometheusText(frontend_, {.per_layer = per_layer}))) {
      if (key.starts_with("soloist:expert_tokens_total{")) ++found, sum += value;
    }
    return found;
  };
  double of_layers = 0, of_experts = 0;
  EXPECT_EQ(count(true, of_layers), layers * experts);
  EXPECT_EQ(count(false, of_experts), experts);
  EXPECT_EQ(of_layers, of_experts);
  EXPECT_GT(of_experts, 0);
}

TEST_F(ExporterTest, TheReportSaysTheSame) {
  EXPECT_EQ(nlohmann::json::parse(LoadReport(frontend_))["state"], "starting");
  Start();
  Generate(7, 5, 1);
  const nlohmann::json report = nlohmann::json::parse(LoadReport(frontend_));
  EXPECT_EQ(report["state"], "ready");
  EXPECT_EQ(report["generated_tokens"], 5);
  EXPECT_EQ(report["prompt_tokens"], 7);
  EXPECT_EQ(report["homes"].size(), 2u);
  EXPECT_EQ(report["checks"].size(), 4u) << "engine, admission, two ranks";
  EXPECT_EQ(report["expert_tokens"].size(), report["num_layers"].get<size_t>() * report["num_experts"].get<size_t>());
  for (const char* name : {"ttft", "itl"}) {
    const auto& latency = report["latency"][name];
    EXPECT_EQ(latency["counts"].size(), latency["bounds"].size() + 1);
    const auto counts = latency["counts"].get<std::vector<int64_t>>();
    EXPECT_EQ(std::accumulate(counts.begin(), counts.end(), int64_t{0}), std::string(name) == "ttft" ? 1 : 4);
  }
}

TEST_F(ExporterTest, WhileTheModelIsLoading) {
  Generate(3, 4, 1);
  auto samples = Samples(PrometheusText(frontend_, {}));
  EXPECT_EQ(samples["soloist:state{model_name=\"model\",state=\"starting\"}"], 1);
  EXPECT_EQ(samples["soloist:requests_refused_total{model_name=\"model\",code=\"UNAVAILABLE\"}"], 1);
  EXPECT_FALSE(samples.contains("soloist:steps_total{model_name=\"model\"}"));
}

// docs/metrics.md lists every family, and nothing else.
TEST_F(ExporterTest, TheDocumentNamesEveryFamily) {
  Start();
  std::ifstream document("docs/metrics.md");
  ASSERT_TRUE(document);
  std::set<std::string> documented;
  for (std::string line; std::getline(document, line);) {
    if (!line.starts_with("| `soloist:")) continue;
    EXPECT_TRUE(documented.insert(line.substr(3, line.find('`', 3) - 3)).second) << "twice: " << line;
  }
  EXPECT_EQ(documented, FamilyNames(PrometheusText(frontend_, {})));
}

TEST_F(ExporterTest, TheDashboardAsksForWhatIsServed) {
  Start();
  const std::set<std::string> served = FamilyNames(PrometheusText(frontend_, {}));
  std::ifstream file("deploy/grafana/soloist.json");
  const nlohmann::json dashboard = nlohmann::json::parse(file);
  constexpr std::string_view kNameLetters = "abcdefghijklmnopqrstuvwxyz0123456789_:";
  int asked = 0;
  for (const auto& panel : dashboard["panels"]) {
    for (const auto& target : panel["targets"]) {
      const std::string expression = target["expr"];
      size_t at = 0;
      while ((at = expression.find("soloist:", at)) != std::string::npos) {
        const size_t end = std::min(expression.find_first_not_of(kNameLetters, at), expression.size());
        std::string family = expression.substr(at, end - at);
        for (const std::string_view suffix : {"_bucket", "_sum", "_count"}) {
          if (family.ends_with(suffix)) family.resize(family.size() - suffix.size());
        }
        EXPECT_TRUE(served.contains(family)) << panel["title"] << ": " << family;
        at = end;
        ++asked;
      }
    }
  }
  EXPECT_GT(asked, 30);
}

}  // namespace
}  // namespace soloist
