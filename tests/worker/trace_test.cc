// The file that --trace writes: valid JSON, a process per rank, every step of every rank on its tracks, in order.
#include "engine/trace.h"

#include <algorithm>
#include <cstdio>
#include <fstream>
#include <iterator>
#include <map>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "engine/model/transformer.h"
#include "gtest/gtest.h"
#include "nlohmann/json.hpp"
#include "tests/parity/engine_harness.h"

namespace soloist {
namespace {

using Json = nlohmann::json;

constexpr int kLayers = 6;  // of models/tiny

struct Span {
  double start, end;
  std::string name;
  int64_t step;
};

// By rank and track.
using Tracks = std::map<std::pair<int, int>, std::vector<Span>>;

Tracks ReadTrace(const std::string& path, std::map<int, std::string>& ranks) {
  std::ifstream file(path);
  const Json events = Json::parse(file);
  Tracks tracks;
  for (const Json& event : events) {
    if (event["ph"] == "M") {
      if (event["name"] == "process_name") ranks[event["pid"]] = event["args"]["name"];
      continue;
    }
    EXPECT_EQ(event["ph"], "X");
    const double start = event["ts"], duration = event["dur"];
    EXPECT_GE(duration, 0);
    tracks[{event["pid"], event["tid"]}].push_back({start, start + duration, event["name"], event["args"]["step"]});
  }
  return tracks;
}

TEST(TraceTest, FourRanksOfTheModel) {
  const std::string path = testing::TempDir() + "/trace.json";
  int64_t steps = 0;
  {
    EngineOptions options{.model_dir = "models/tiny", .num_ranks = 4};
    options.trace_file = path;
    Harness harness(options, {});
    ASSERT_TRUE(harness.ok());
    Request request;
    request.id = "r";
    for (int i = 0; i < 40; ++i) request.prompt.push_back(i * 7);
    request.sampling = {.max_tokens = 5, .ignore_eos = true};
    ASSERT_EQ(harness.Run({request})[0][0].tokens.size(), 5u);
    steps = harness.loop().Load().steps;
  }
  ASSERT_GE(steps, 5);
  std::map<int, std::string> ranks;
  Tracks tracks = ReadTrace(path, ranks);
  EXPECT_EQ(ranks, (std::map<int, std::string>{{0, "rank 0"}, {1, "rank 1"}, {2, "rank 2"}, {3, "rank 3"}}));
  for (const auto& [rank, _] : ranks) {
    std::map<std::string, std::map<int64_t, int>> spans;  // by name and step
    for (const TraceTrack track : {TraceTrack::kHost, TraceTrack::kCompute, TraceTrack::kCommunication}) {
      const std::vector<Span>& of_track = tracks[{rank, static_cast<int>(track)}];
      ASSERT_FALSE(of_track.empty());
      for (size_t i = 0; i < of_track.size(); ++i) {
        ++spans[of_track[i].name][of_track[i].step];
        if (i == 0) continue;
        EXPECT_GE(of_track[i].start, of_track[i - 1].end - 0.002) << "rank " << rank << " " << of_track[i].name;
        EXPECT_GE(of_track[i].step, of_track[i - 1].step);
      }
    }
    for (int64_t step = 1; step <= steps; ++step) {
      EXPECT_EQ(spans["submit"][step], 1);
      EXPECT_EQ(spans["wait_for_plan"][step], step > 1 ? 1 : 0);
      for (const char* once : {"embed", "head", "sample"}) EXPECT_EQ(spans[once][step], 1) << once;
      for (const char* group : {"attention", "router", "dispatch", "expert", "combine"}) {
        EXPECT_EQ(spans[group][step], kLayers) << group;
      }
      // Masked, there and back; or the counts, there and back.
      const int masked = spans["all_to_all"][step], exact = spans["all_to_all_v"][step];
      EXPECT_EQ(masked + exact, 2 * kLayers);
      EXPECT_EQ(spans["all_gather"][step], exact / 2);
    }
    EXPECT_EQ(spans["all_to_all_v"][1], 2 * kLayers) << "a chunk of 40 tokens";
    EXPECT_EQ(spans["all_to_all"][steps], 2 * kLayers) << "one token";
    // What travels does so within a dispatch or a combine.
    const std::vector<Span>& compute = tracks[{rank, static_cast<int>(TraceTrack::kCompute)}];
    for (const Span& travel : tracks[{rank, static_cast<int>(TraceTrack::kCommunication)}]) {
      const bool inside = std::ranges::any_of(compute, [&](const Span& s) {
        return (s.name == "dispatch" || s.name == "combine") && s.step == travel.step &&
               s.start <= travel.start + 0.002 && travel.end <= s.end + 0.002;
      });
      EXPECT_TRUE(inside) << travel.name << " of step " << travel.step;
    }
  }
}

// Two micro-batches: each rank's communication track has the jobs in the order of kCollectiveOrder, and some of them
// lie under computation.
TEST(TraceTest, TwoMicroBatches) {
  const std::string path = testing::TempDir() + "/overlap.json";
  {
    EngineOptions options{.model_dir = "models/tiny", .num_ranks = 4};
    options.trace_file = path;
    Harness harness(options, {.micro_batches = MicroBatches::kTwo});
    ASSERT_TRUE(harness.ok());
    std::vector<Request> requests(4);
    for (int r = 0; r < 4; ++r) {
      requests[r].id = std::to_string(r);
      for (int i = 0; i < 100; ++i) requests[r].prompt.push_back(i * 7 + r);
      requests[r].sampling = {.max_tokens = 1, .ignore_eos = true};
    }
    harness.Run(requests);
  }
  std::map<int, std::string> ranks;
  Tracks tracks = ReadTrace(path, ranks);
  ASSERT_EQ(ranks.size(), 4u);
  const std::string order = std::string(kCollectiveOrder.substr(kCollectiveOrder.find("; ") + 2)) + ", ";
  int hidden = 0;
  for (const auto& [rank, _] : ranks) {
    std::vector<Span> compute = tracks[{rank, static_cast<int>(TraceTrack::kCompute)}];
    const std::vector<Span> waits = [&] {
      std::vector<Span> out;
      std::ranges::copy_if(compute, std::back_inserter(out), [](const Span& s) { return s.name.starts_with("wait "); });
      return out;
    }();
    std::map<int64_t, std::string> jobs;  // by step
    for (const Span& job : tracks[{rank, static_cast<int>(TraceTrack::kCommunication)}]) {
      if (!job.name.ends_with(" A") && !job.name.ends_with(" B")) continue;
      jobs[job.step] += job.name + ", ";
      // In the midst of it the rank does something else than to wait.
      const double middle = (job.start + job.end) / 2;
      const auto holds = [middle](const Span& s) { return s.start <= middle && middle <= s.end; };
      if (std::ranges::any_of(compute, holds) && std::ranges::none_of(waits, holds)) ++hidden;
    }
    ASSERT_FALSE(jobs.empty());
    for (const auto& [step, names] : jobs) {
      std::string expected;
      for (int layer = 0; layer < kLayers; ++layer) expected += order;
      EXPECT_EQ(names, expected) << "rank " << rank << " step " << step;
    }
    std::map<std::string, int> counts;
    for (const Span& s : compute) ++counts[s.name];
    const int steps = static_cast<int>(std::ssize(jobs));
    for (const char* group : {"attention", "router", "expert", "combine"}) {
      for (const char* half : {" A", " B"}) EXPECT_EQ(counts[std::string(group) + half], kLayers * steps) << group;
    }
    // Put together and awaited.
    EXPECT_EQ(counts["dispatch A"], 2 * kLayers * steps);
    EXPECT_EQ(counts["dispatch B"], 2 * kLayers * steps);
    EXPECT_EQ(std::ssize(waits), 4 * kLayers * steps);
  }
  EXPECT_GT(hidden, 0);
}

// A process that is killed leaves a file that can be read.
TEST(TraceTest, CompleteAfterEveryFlush) {
  const std::string path = testing::TempDir() + "/flushed.json";
  const auto writer = TraceWriter::Open(path).value();
  std::map<int, std::string> ranks;
  writer->Flush();
  EXPECT_EQ(ReadTrace(path, ranks).size(), 0u);
  writer->AddRank(3);
  for (int64_t step = 1; step < 100; ++step) {
    writer->Span(3, TraceTrack::kHost, "submit", step, step * 1000, step * 1000 + 1);
    writer->Flush();
    Tracks tracks = ReadTrace(path, ranks);
    ASSERT_EQ(std::ssize((tracks[{3, 0}])), step);
    EXPECT_EQ((tracks[{3, 0}].back().step), step);
  }
  EXPECT_EQ(ranks[3], "rank 3");
}

TEST(TraceTest, AFileThatCannotBeWritten) {
  EngineOptions options{.model_dir = "models/tiny"};
  options.trace_file = "/nowhere/trace.json";
  const auto engine = CreateInProcessEngine(options, Clock::Real(), nullptr);
  EXPECT_EQ(engine.status().code(), absl::StatusCode::kUnavailable);
  EXPECT_NE(engine.status().message().find("/nowhere/trace.json"), std::string::npos);
}

}  // namespace
}  // namespace soloist
