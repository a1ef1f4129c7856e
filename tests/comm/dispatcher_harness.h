// Runs steps through TokenDispatchers, all ranks of a group at once, and checks what each expert gets. For
// dispatcher_test.cc.
//
// Tokens are global: token t has the same row, experts and weights whatever its home, so that results can be compared
// over group sizes. The experts here are cheap functions that move columns and differ in scale by many powers of ten:
// a wrong row, a wrong expert or another order of summation gives other bits.
#ifndef SOLOIST_TESTS_COMM_DISPATCHER_HARNESS_H_
#define SOLOIST_TESTS_COMM_DISPATCHER_HARNESS_H_

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <map>
#include <memory>
#include <random>
#include <vector>

#include "engine/comm/dispatcher.h"
#include "gtest/gtest.h"
#include "tests/comm/comm_group.h"

namespace soloist {

struct RoutedToken {
  std::vector<float> x;
  std::vector<int32_t> experts;  // negative: none (padding)
  std::vector<float> weights;
};

// out[d] of expert e is a function of e and one element of x. Not inlined: the reference and the ranks run the same
// instructions, so they may be compared bit for bit.
[[gnu::noinline]] inline void RunExpert(int expert, const float* x, int hidden, float* out) {
  constexpr float kScale[] = {1.0f, 3e6f, -3e6f, 7e-4f, 11.0f};
  for (int d = 0; d < hidden; ++d) {
    out[d] = x[(d + expert) % hidden] * kScale[expert % 5] + static_cast<float>(expert);
  }
}

inline bool SameBits(const std::vector<float>& a, const std::vector<float>& b) {
  return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size() * sizeof(float)) == 0;
}

// The definition: a token's experts' rows, weighted, added in the router's order. `weights` that are powers of two make
// the products exact, so that it does not matter whether a backend fuses multiply and add.
inline std::vector<float> ReferenceOutput(const RoutedToken& token) {
  const int hidden = static_cast<int>(token.x.size());
  std::vector<float> out(token.x.size(), 0.0f), y(token.x.size());
  for (size_t j = 0; j < token.experts.size(); ++j) {
    if (token.experts[j] < 0) continue;
    RunExpert(token.experts[j], token.x.data(), hidden, y.data());
    for (int d = 0; d < hidden; ++d) out[d] += token.weights[j] * y[d];
  }
  return out;
}

// `top_k` different experts, in random order.
inline std::vector<RoutedToken> RandomTokens(int64_t count, const DispatcherOptions& options, bool exact_weights,
                                             uint32_t seed) {
  std::mt19937 random(seed);
  std::normal_distribution<float> normal(0, 1);
  std::vector<RoutedToken> tokens(static_cast<size_t>(count));
  std::vector<int32_t> experts(static_cast<size_t>(options.num_experts));
  for (int32_t e = 0; e < options.num_experts; ++e) experts[e] = e;
  for (RoutedToken& token : tokens) {
    for (int d = 0; d < options.hidden_size; ++d) token.x.push_back(normal(random));
    std::shuffle(experts.begin(), experts.end(), random);
    token.experts.assign(experts.begin(), experts.begin() + options.top_k);
    for (int j = 0; j < options.top_k; ++j) {
      token.weights.push_back(exact_weights ? std::ldexp(1.0f, -static_cast<int>(random() % 6))
                                            : std::abs(normal(random)) + 1e-3f);
    }
  }
  return tokens;
}

// The tokens without the choices that find no room where each (home, expert) has `room` rows; 0: all.
inline std::vector<RoutedToken> WithRoom(std::vector<RoutedToken> tokens, const std::vector<std::vector<int>>& homes,
                                         int64_t room) {
  for (const std::vector<int>& home : homes) {
    std::map<int32_t, int64_t> rows;
    for (const int t : home) {
      for (int32_t& e : tokens[t].experts) {
        if (e >= 0 && room > 0 && rows[e]++ >= room) e = -1;
      }
    }
  }
  return tokens;
}

// Device memory that is not zero when it is allocated: a dispatcher must write what it reads.
class PoisoningDevice final : public Device {
 public:
  explicit PoisoningDevice(Device& device) : device_(device), stream_(*device.CreateStream()) {}
  std::string Name() const override { return device_.Name(); }
  DType activation_dtype() const override { return device_.activation_dtype(); }
  bool host_accessible() const override { return device_.host_accessible(); }
  absl::StatusOr<Buffer> Allocate(int64_t bytes) override { return Poisoned(device_.Allocate(bytes)); }
  absl::StatusOr<Buffer> AllocatePinned(int64_t bytes) override { return Poisoned(device_.AllocatePinned(bytes)); }
  absl::StatusOr<std::unique_ptr<Stream>> CreateStream() override { return device_.CreateStream(); }
  absl::StatusOr<std::unique_ptr<Event>> CreateEvent() override { return device_.CreateEvent(); }
  void Wait(Stream& stream, const Event& event) override { device_.Wait(stream, event); }
  void Record(Event& event, Stream& stream) override { device_.Record(event, stream); }
  bool can_capture() const override { return device_.can_capture(); }
  absl::StatusOr<std::unique_ptr<Graph>> Capture(Stream& stream,
                                                 const std::function<absl::Status()>& enqueue) override {
    return device_.Capture(stream, enqueue);
  }
  absl::Status Launch(const Graph& graph, Stream& stream) override { return device_.Launch(graph, stream); }
  absl::Status Prepare(const OpLimits& limits) override { return device_.Prepare(limits); }
  void Copy(void* dst, const void* src, int64_t bytes, Stream& stream) override {
    device_.Copy(dst, src, bytes, stream);
  }
  int64_t FreeBytes() const override { return device_.FreeBytes(); }
  Ops& ops() override { return device_.ops(); }

 private:
  absl::StatusOr<Buffer> Poisoned(absl::StatusOr<Buffer> buffer) {
    if (!buffer.ok()) return buffer;
    const std::vector<uint8_t> poison(static_cast<size_t>(buffer->bytes()), 0xFF);  // NaN, or -1
    device_.Copy(buffer->data(), poison.data(), buffer->bytes(), *stream_);
    CHECK_OK(stream_->Synchronize());
    return buffer;
  }

  Device& device_;
  std::unique_ptr<Stream> stream_;
};

// One group of ranks with a dispatcher each.
class DispatcherGroup {
 public:
  DispatcherGroup(int ranks, const DispatcherOptions& options, absl::Duration timeout = absl::Seconds(40))
      : options_(options),
        group_(ranks == 1 ? SelfTestGroup() : SharedMemoryTestGroup(ranks, {.timeout = timeout})),
        local_experts_(static_cast<size_t>(ranks)) {
    for (int e = 0; e < options.num_experts; ++e) local_experts_[options.expert_rank[e]].push_back(e);
    for (TestRank& rank : group_.ranks) {
      devices_.push_back(std::make_unique<PoisoningDevice>(*rank.device));
      dispatchers_.push_back(CreateTokenDispatcher(options, *devices_.back(), *rank.comm).value());
    }
  }

  int size() const { return group_.size(); }
  TestGroup& group() { return group_; }
  TokenDispatcher& dispatcher(int rank) { return *dispatchers_[rank]; }

  // One step of `tokens`, of which home h has those in homes[h], in this order, with room for `spare` tokens more than
  // the largest home has, and masked for `room` rows of each (home, expert). Returns each token's output and fails the
  // test where an expert does not get exactly its rows (those that found room).
  std::vector<std::vector<float>> Step(const std::vector<RoutedToken>& tokens,
                                       const std::vector<std::vector<int>>& homes, DispatchLayout layout,
                                       int64_t spare = 0, int64_t room = 0) {
    int64_t max_tokens = 0;
    for (const std::vector<int>& home : homes) max_tokens = std::max(max_tokens, std::ssize(home));
    max_tokens += spare;
    const DispatchCapacity capacity{.max_tokens = max_tokens, .masked_rows = room};
    const std::vector<RoutedToken> kept = WithRoom(tokens, homes, layout == DispatchLayout::kMasked ? room : 0);
    std::vector<std::vector<float>> outputs(tokens.size());
    group_.Run([&](TestRank& rank) {
      const std::vector<int>& mine = homes[rank.id()];
      const Inputs in = MakeInputs(rank, tokens, mine);
      const auto handle =
          dispatchers_[rank.id()]->Dispatch(in.x, in.experts, in.weights, capacity, in.counts, *rank.stream);
      ASSERT_EQ(handle.status(), absl::OkStatus());
      EXPECT_EQ(handle->layout, size() == 1 ? DispatchLayout::kContiguous : layout);
      EXPECT_EQ(handle->row_offsets != nullptr, size() == 1);
      EXPECT_EQ(dispatchers_[rank.id()]->WaitsOnHost(max_tokens), size() > 1 && layout == DispatchLayout::kContiguous);
      CheckCounts(rank, in, tokens, mine);
      const auto counts = rank.Download<int32_t>(in.counts, options_.num_experts);
      const int64_t most = std::ranges::max(counts);
      EXPECT_EQ(dispatchers_[rank.id()]->OverflowRows(counts, capacity),
                size() > 1 && layout == DispatchLayout::kMasked && room > 0 && most > room ? most : 0);
      RunExperts(rank, *handle, kept, homes);

      const int64_t stride = options_.hidden_size + kGap;
      const Buffer out = rank.Upload(std::vector<float>(mine.size() * stride, kPoison));
      Tensor out_tensor = in.x;
      out_tensor.data = out.data();
      ASSERT_EQ(rank.Finish(dispatchers_[rank.id()]->Combine(*handle, {.delta = out_tensor}, *rank.stream)),
                absl::OkStatus());
      const std::vector<float> rows = rank.Download<float>(out.data(), std::ssize(mine) * stride);
      for (size_t i = 0; i < mine.size(); ++i) {
        const auto row = rows.begin() + static_cast<int64_t>(i) * stride;
        outputs[mine[i]].assign(row, row + options_.hidden_size);
        for (int64_t d = options_.hidden_size; d < stride; ++d) EXPECT_TRUE(std::isnan(row[d])) << "written past a row";
      }
      // What this step leaves behind must not help the next.
      Poison(rank, handle->expert_input);
      Poison(rank, handle->expert_output);
    });
    return outputs;
  }

  // The same as two micro-batches, of which the second of home h begins at seconds[h].
  std::vector<std::vector<float>> StepInTwo(const std::vector<RoutedToken>& tokens,
                                            const std::vector<std::vector<int>>& homes, const std::vector<int>& seconds,
                                            DispatchLayout layout) {
    std::vector<std::vector<int>> halves[kMaxMicroBatches];
    int64_t max_tokens = 0;
    for (size_t h = 0; h < homes.size(); ++h) {
      halves[0].emplace_back(homes[h].begin(), homes[h].begin() + seconds[h]);
      halves[1].emplace_back(homes[h].begin() + seconds[h], homes[h].end());
      max_tokens = std::max(max_tokens, std::ssize(homes[h]));
    }
    std::vector<std::vector<float>> outputs(tokens.size());
    group_.Run([&](TestRank& rank) {
      TokenDispatcher& dispatcher = *dispatchers_[rank.id()];
      CommTimes times;
      dispatcher.queue().BeginStep(/*overlaps=*/true, &times);
      Inputs in[kMaxMicroBatches];
      DispatchHandle handles[kMaxMicroBatches];
      for (int i = 0; i < kMaxMicroBatches; ++i) {
        in[i] = MakeInputs(rank, tokens, halves[i][rank.id()]);
        ASSERT_EQ(dispatcher.StartDispatch(i, {in[i].x, in[i].experts, in[i].weights, {max_tokens}, in[i].counts},
                                           *rank.stream),
                  absl::OkStatus());
      }
      for (int i = 0; i < kMaxMicroBatches; ++i) {
        const auto handle = dispatcher.FinishDispatch(i, *rank.stream);
        ASSERT_EQ(handle.status(), absl::OkStatus());
        handles[i] = *handle;
        EXPECT_EQ(handle->layout, size() == 1 ? DispatchLayout::kContiguous : layout);
        CheckCounts(rank, in[i], tokens, halves[i][rank.id()]);
        RunExperts(rank, *handle, tokens, halves[i]);
        ASSERT_EQ(dispatcher.StartCombine(*handle, *rank.stream), absl::OkStatus());
      }
      for (int i = 0; i < kMaxMicroBatches; ++i) {
        const std::vector<int>& mine = halves[i][rank.id()];
        const Buffer out = rank.Upload(std::vector<float>(mine.size() * options_.hidden_size, kPoison));
        const Tensor delta = out.View<float>(std::ssize(mine), options_.hidden_size);
        ASSERT_EQ(rank.Finish(dispatcher.FinishCombine(handles[i], {.delta = delta}, *rank.stream)), absl::OkStatus());
        for (size_t t = 0; t < mine.size(); ++t) {
          outputs[mine[t]] = rank.Download<float>(delta.row<float>(static_cast<int64_t>(t)), options_.hidden_size);
        }
      }
      // Two jobs of each, unless nothing travels.
      EXPECT_EQ(times.size(), size() == 1 ? 0 : 4);
      EXPECT_GE(times.busy_ns(), 0);
      EXPECT_GE(times.wait_ns(), 0);
    });
    return outputs;
  }

  struct Inputs {
    Buffer x_data, experts_data, weights_data, counts_data;
    Tensor x, experts, weights;
    int32_t* counts = nullptr;
  };
  // Rows of x are further apart than they are long.
  Inputs MakeInputs(TestRank& rank, const std::vector<RoutedToken>& tokens, const std::vector<int>& mine) const {
    std::vector<float> x, weights;
    std::vector<int32_t> experts;
    for (const int t : mine) {
      x.insert(x.end(), tokens[t].x.begin(), tokens[t].x.end());
      x.insert(x.end(), kGap, kPoison);
      experts.insert(experts.end(), tokens[t].experts.begin(), tokens[t].experts.end());
      weights.insert(weights.end(), tokens[t].weights.begin(), tokens[t].weights.end());
    }
    Inputs in = {rank.Upload(x),
                 rank.Upload(experts),
                 rank.Upload(weights),
                 rank.Filled(options_.num_experts * 4, 0xFF),
                 {},
                 {},
                 {},
                 nullptr};
    const int64_t n = std::ssize(mine), k = options_.top_k, hidden = options_.hidden_size;
    in.x = {in.x_data.data(), options_.dtype, n, hidden, hidden + kGap};
    in.experts = in.experts_data.View<int32_t>(n, k);
    in.weights = in.weights_data.View<float>(n, k);
    in.counts = static_cast<int32_t*>(in.counts_data.data());
    return in;
  }

 private:
  static constexpr int64_t kGap = 4;
  static constexpr float kPoison = std::numeric_limits<float>::quiet_NaN();

  static void Poison(TestRank& rank, const Tensor& tensor) {
    const std::vector<uint8_t> poison(static_cast<size_t>(tensor.bytes()), 0xFF);
    rank.device->Copy(tensor.data, poison.data(), tensor.bytes(), *rank.stream);
    CHECK_OK(rank.stream->Synchronize());
  }

  void CheckCounts(TestRank& rank, const Inputs& in, const std::vector<RoutedToken>& tokens,
                   const std::vector<int>& mine) const {
    std::vector<int32_t> expected(static_cast<size_t>(options_.num_experts), 0);
    for (const int t : mine) {
      for (const int32_t e : tokens[t].experts) {
        if (e >= 0) ++expected[e];
      }
    }
    EXPECT_EQ(rank.Download<int32_t>(in.counts, options_.num_experts), expected);
  }

  // The rows that expert `e` must get: of source after source, token after token.
  static std::vector<const std::vector<float>*> ExpectedRows(int e, const std::vector<RoutedToken>& tokens,
                                                             const std::vector<std::vector<int>>& homes) {
    std::vector<const std::vector<float>*> rows;
    for (const std::vector<int>& home : homes) {
      for (const int t : home) {
        for (const int32_t chosen : tokens[t].experts) {
          if (chosen == e) rows.push_back(&tokens[t].x);
        }
      }
    }
    return rows;
  }

  // Checks the groups and runs them; rows that belong to no group get NaN as their output.
  void RunExperts(TestRank& rank, const DispatchHandle& handle, const std::vector<RoutedToken>& tokens,
                  const std::vector<std::vector<int>>& homes) {
    const int hidden = options_.hidden_size;
    const int64_t rows = handle.expert_input.rows;
    EXPECT_LE(rows, dispatchers_[rank.id()]->max_expert_rows());
    ASSERT_EQ(handle.expert_output.rows, rows);
    ASSERT_EQ(handle.expert_input.stride, hidden);
    ASSERT_EQ(handle.expert_output.stride, hidden);
    const std::vector<float> in = rank.Download<float>(handle.expert_input.data, rows * hidden);
    std::vector<float> out(in.size(), kPoison);
    std::vector<int> owner(static_cast<size_t>(rows), -1);

    std::map<int, std::vector<int64_t>> rows_of;  // local expert: its rows, in the groups' order
    int last = -1;
    for (const ExpertRows& group : handle.groups) {
      EXPECT_TRUE(group.expert == last || !rows_of.contains(group.expert)) << "an expert's groups are consecutive";
      last = group.expert;
      const int32_t count = rank.Download<int32_t>(group.row_count, 1)[0];
      ASSERT_GE(count, 0);
      ASSERT_LE(count, group.row_capacity);
      int64_t begin = group.row_begin, end = begin + group.row_capacity;
      if (group.row_begin_on_device != nullptr) {
        begin = rank.Download<int32_t>(group.row_begin_on_device, 1)[0];
        end = begin + count;
      }
      ASSERT_GE(begin, 0);
      ASSERT_LE(end, rows);
      for (int64_t i = begin; i < begin + count; ++i) {
        EXPECT_EQ(owner[i], -1) << "row " << i << " belongs to two groups";
        owner[i] = group.expert;
        rows_of[group.expert].push_back(i);
      }
    }
    const std::vector<int>& local = local_experts_[rank.id()];
    int64_t total = 0;
    for (const auto& [expert, its_rows] : rows_of) {
      ASSERT_TRUE(expert >= 0 && expert < std::ssize(local)) << "local expert " << expert;
    }
    if (handle.row_offsets != nullptr) {
      const auto offsets = rank.Download<int32_t>(handle.row_offsets, std::ssize(local) + 1);
      for (const auto& [expert, its_rows] : rows_of) {
        EXPECT_EQ(its_rows.front(), offsets[expert]);
        EXPECT_EQ(std::ssize(its_rows), offsets[expert + 1] - offsets[expert]);
      }
    }
    for (int l = 0; l < std::ssize(local); ++l) {
      const std::vector<const std::vector<float>*> expected = ExpectedRows(local[l], tokens, homes);
      const std::vector<int64_t>& got = rows_of[l];
      total += std::ssize(got);
      ASSERT_EQ(got.size(), expected.size()) << "rows of expert " << local[l] << " on rank " << rank.id();
      for (size_t i = 0; i < got.size(); ++i) {
        const float* row = in.data() + got[i] * hidden;
        ASSERT_EQ(std::memcmp(row, expected[i]->data(), static_cast<size_t>(hidden) * sizeof(float)), 0)
            << "row " << i << " of expert " << local[l] << " on rank " << rank.id();
        RunExpert(local[l], row, hidden, out.data() + got[i] * hidden);
      }
    }
    if (handle.layout == DispatchLayout::kContiguous) {
      EXPECT_LE(total, handle.expected_rows);
      if (size() > 1) {
        EXPECT_EQ(total, handle.expected_rows) << "the host knows it";
      }
    } else {
      const int64_t choices = handle.max_tokens * size() * options_.top_k * std::ssize(local);
      EXPECT_EQ(handle.expected_rows, (choices + options_.num_experts - 1) / options_.num_experts);
    }
    rank.device->Copy(handle.expert_output.data, out.data(), handle.expert_output.bytes(), *rank.stream);
    CHECK_OK(rank.stream->Synchronize());
  }

  const DispatcherOptions options_;
  TestGroup group_;
  std::vector<std::vector<int>> local_experts_;  // [rank][local expert]: expert id
  std::vector<std::unique_ptr<Device>> devices_;
  std::vector<std::unique_ptr<TokenDispatcher>> dispatchers_;  // destroyed before the communicators
};

}  // namespace soloist

#endif  // SOLOIST_TESTS_COMM_DISPATCHER_HARNESS_H_
