// Sample on CUDA against the CPU backend's Sample on the same inputs: the same tokens and log-probabilities.
#include <algorithm>
#include <cmath>
#include <vector>

#include "gtest/gtest.h"
#include "kernels/ops.h"
#include "tests/gpu/gpu_fixture.h"

namespace soloist {
namespace {

// What Sample reads, on the host.
struct Inputs {
  int64_t vocab = 0;
  std::vector<float> logits;
  std::vector<SamplingRow> params;  // one more than there are rows
  std::vector<LogitBias> bias;
  std::vector<TokenHistory> history;
  std::vector<int32_t> previous;
  std::vector<int32_t> mask_of_row, masks;
  std::vector<int32_t> targets;
  int64_t rows() const { return std::ssize(params) - 1; }
};

struct Results {
  std::vector<int32_t> tokens, top_tokens;
  std::vector<float> logprobs, top_logprobs, raw_logits;
};

// What a row may ask for.
enum Ask : uint32_t {
  kTemperature = 1,
  kTopK = 2,
  kTopP = 4,
  kMinP = 8,
  kPenalties = 16,
  kBias = 32,
  kTop = 64,
  kRaw = 128,
  kMask = 256,
  kTarget = 512
};

Inputs MakeInputs(int64_t rows, int64_t vocab, uint32_t asks, bool ties, Random& random) {
  Inputs in;
  in.vocab = vocab;
  in.logits = random.Normal(rows * vocab, 3);
  if (ties) {
    for (float& logit : in.logits) logit = std::round(logit * 2) / 2;
  }
  in.params.resize(rows + 1);
  in.previous.resize(rows + 1);
  const auto token = [&] { return static_cast<int32_t>(random.Int(0, vocab - 1)); };
  for (int32_t& previous : in.previous) previous = token();
  for (int64_t r = 0; r <= rows; ++r) {
    SamplingRow& row = in.params[r];
    row.bias_begin = static_cast<int32_t>(in.bias.size());
    row.history_begin = static_cast<int32_t>(in.history.size());
    if (r == rows) break;
    const auto asked = [&](Ask ask) { return (asks & ask) != 0 && random.Int(0, 3) > 0; };
    if (asked(kTemperature)) row.temperature = 0.1f + 1.5f * static_cast<float>(random.Unit());
    if (asked(kTopK)) row.top_k = static_cast<int32_t>(random.Int(0, 4) == 0 ? 1 : random.Int(1, 2 * vocab / 3 + 1));
    if (asked(kTopP)) row.top_p = random.Int(0, 5) == 0 ? 0.01f : 0.3f + 0.7f * static_cast<float>(random.Unit());
    if (asked(kMinP)) row.min_p = 0.2f * static_cast<float>(random.Unit());
    row.seed_low = static_cast<uint32_t>(random.Bits());
    row.seed_high = static_cast<uint32_t>(random.Bits());
    row.output_index = static_cast<int32_t>(random.Int(0, 3));
    row.position = static_cast<int32_t>(random.Int(0, 5000));
    if (asked(kTop))
      row.num_top_logprobs = static_cast<int32_t>(random.Int(0, std::min<int64_t>(vocab, kMaxTopLogprobs)));
    if (asked(kRaw)) row.return_logits = 1;
    in.targets.push_back(asked(kTarget) ? token() : -1);
    in.mask_of_row.push_back(-1);
    if (asked(kMask)) {
      // Few tokens or half of them, and never none.
      const int64_t words = TokenMaskWords(vocab);
      in.mask_of_row.back() = static_cast<int32_t>(std::ssize(in.masks) / words);
      const bool few = random.Int(0, 1) == 0;
      for (int64_t w = 0; w < words; ++w) {
        in.masks.push_back(few && random.Int(0, 9) > 0 ? 0 : static_cast<int32_t>(random.Bits()));
      }
      in.masks[std::ssize(in.masks) - words] |= 1;
    }
    if (asked(kBias)) {
      for (int i = 0; i < 5; ++i) {
        const float value = i == 0 ? -INFINITY : 20 * (static_cast<float>(random.Unit()) - 0.5f);
        in.bias.push_back({token(), value});
      }
      // The likeliest token is wanted by one entry (a request's bias) and banned by another (an end token before
      // min_tokens).
      const float* logits = &in.logits[r * vocab];
      const auto likeliest = static_cast<int32_t>(std::max_element(logits, logits + vocab) - logits);
      in.bias.push_back({likeliest, 3});
      in.bias.push_back({likeliest, -INFINITY});
    }
    if (asked(kPenalties)) {
      row.repetition_penalty = 1.0f + static_cast<float>(random.Unit());
      row.presence_penalty = static_cast<float>(random.Unit());
      row.frequency_penalty = static_cast<float>(random.Unit());
      row.pending_row = static_cast<int32_t>(random.Int(-1, rows));
      std::vector<int32_t> distinct;
      for (int i = 0; i < std::min<int64_t>(40, vocab); ++i) distinct.push_back(token());
      if (row.pending_row >= 0 && random.Int(0, 1) == 0) distinct.push_back(in.previous[row.pending_row]);
      std::ranges::sort(distinct);
      distinct.erase(std::unique(distinct.begin(), distinct.end()), distinct.end());
      for (const int32_t id : distinct) in.history.push_back({id, static_cast<int32_t>(random.Int(0, 4))});
    }
  }
  return in;
}

Results OnCpu(const Inputs& in) {
  static const auto factory = *CreateDeviceFactory({});
  static const auto device = *factory->CreateDevice(0);
  static const auto stream = *device->CreateStream();
  const int64_t rows = in.rows();
  std::vector<float> logits = in.logits;
  Results r{std::vector<int32_t>(rows), std::vector<int32_t>(rows * kMaxTopLogprobs), std::vector<float>(rows),
            std::vector<float>(rows * kMaxTopLogprobs), std::vector<float>(rows * in.vocab)};
  device->ops().Sample({.logits = MakeTensor(logits.data(), rows, in.vocab),
                        .params = in.params.data(),
                        .bias = in.bias.data(),
                        .history = in.history.data(),
                        .previous_tokens = in.previous.data(),
                        .mask_of_row = in.mask_of_row.data(),
                        .masks = in.masks.data(),
                        .targets = in.targets.data(),
                        .tokens = r.tokens.data(),
                        .logprobs = r.logprobs.data(),
                        .top_tokens = r.top_tokens.data(),
                        .top_logprobs = r.top_logprobs.data(),
                        .raw_logits = r.raw_logits.data()},
                       *stream);
  return r;
}

Results OnGpu(const Inputs& in, const std::string& what) {
  Gpu& gpu = Gpu::For(LimitsOf(kTinySizes));
  const int64_t rows = in.rows();
  const bool raw = std::ranges::any_of(in.params, [](const SamplingRow& row) { return row.return_logits != 0; });
  const DeviceArray<SamplingRow> params(gpu, in.params);
  const DeviceArray<LogitBias> bias(gpu, in.bias);
  const DeviceArray<TokenHistory> history(gpu, in.history);
  const DeviceArray<int32_t> previous(gpu, in.previous);
  const DeviceArray<int32_t> mask_of_row(gpu, in.mask_of_row);
  const DeviceArray<int32_t> masks(gpu, in.masks);
  const DeviceArray<int32_t> targets(gpu, in.targets);
  const auto logits = DeviceArray<float>::Guarded(gpu, in.logits);
  const auto tokens = DeviceArray<int32_t>::Poisoned(gpu, rows);
  const auto logprobs = DeviceArray<float>::Poisoned(gpu, rows);
  const auto top_tokens = DeviceArray<int32_t>::Poisoned(gpu, rows * kMaxTopLogprobs);
  const auto top_logprobs = DeviceArray<float>::Poisoned(gpu, rows * kMaxTopLogprobs);
  const auto raw_logits = DeviceArray<float>::Poisoned(gpu, raw ? rows * in.vocab : 0);
  gpu.ops().Sample({.logits = logits.View(rows, in.vocab),
                    .params = params.data(),
                    .bias = bias.data(),
                    .history = history.data(),
                    .previous_tokens = previous.data(),
                    .mask_of_row = mask_of_row.data(),
                    .masks = masks.data(),
                    .targets = targets.data(),
                    .tokens = tokens.data(),
                    .logprobs = logprobs.data(),
                    .top_tokens = top_tokens.data(),
                    .top_logprobs = top_logprobs.data(),
                    .raw_logits = raw ? raw_logits.data() : nullptr},
                   gpu.stream());
  logits.Read(what);
  return {tokens.Read(what), top_tokens.Read(what), logprobs.Read(what), top_logprobs.Read(what),
          raw_logits.Read(what)};
}

struct Count {
  int64_t rows = 0, other_tokens = 0;
  double worst = 0;
};

void Compare(const Inputs& in, const std::string& what, Count& count) {
  const Results cpu = OnCpu(in), gpu = OnGpu(in, what);
  for (int64_t r = 0; r < in.rows(); ++r) {
    const SamplingRow& row = in.params[r];
    const std::string name = what + Text(" row %d (temperature %g top_k %d top_p %g min_p %g)", static_cast<int>(r),
                                         row.temperature, row.top_k, row.top_p, row.min_p);
    ++count.rows;
    ASSERT_TRUE(gpu.tokens[r] >= 0 && gpu.tokens[r] < in.vocab) << name << ": token " << gpu.tokens[r];
    if (in.targets[r] >= 0) {
      EXPECT_EQ(gpu.tokens[r], in.targets[r]) << name << ": its target";
    }
    if (cpu.tokens[r] != gpu.tokens[r]) {
      ++count.other_tokens;
      std::printf("  %s: token %d, on the CPU %d\n", name.c_str(), gpu.tokens[r], cpu.tokens[r]);
      EXPECT_NE(row.temperature, 0) << name << ": greedy tokens must be equal";
    } else {
      EXPECT_NEAR(gpu.logprobs[r], cpu.logprobs[r], 2e-4) << name;
      count.worst = std::max<double>(count.worst, std::abs(gpu.logprobs[r] - cpu.logprobs[r]));
    }
    const int64_t top = r * kMaxTopLogprobs;
    for (int64_t i = top; i < top + kMaxTopLogprobs; ++i) {
      EXPECT_EQ(gpu.top_tokens[i], cpu.top_tokens[i]) << name << " top " << i - top;
      if (i - top < row.num_top_logprobs) {
        EXPECT_NEAR(gpu.top_logprobs[i], cpu.top_logprobs[i], 2e-4) << name << " top " << i - top;
      }
    }
    if (row.return_logits != 0) {
      EXPECT_TRUE(SameBits(&gpu.raw_logits[r * in.vocab], &in.logits[r * in.vocab], in.vocab))
          << name << ": raw logits";
    }
  }
}

void TestSample(const std::vector<std::pair<int, int>>& shapes, const std::vector<uint32_t>& asks) {
  Random random;
  Count count;
  for (const auto& [rows, vocab] : shapes) {
    for (const uint32_t ask : asks) {
      for (const bool ties : {false, true}) {
        Compare(MakeInputs(rows, vocab, ask, ties, random),
                Text("rows=%d vocab=%d asks=%u%s", rows, vocab, ask, ties ? " ties" : ""), count);
      }
    }
  }
  std::printf("  Sample: %lld rows, %lld tokens other than on the CPU, log-probabilities differ by %.1e at most\n",
              static_cast<long long>(count.rows), static_cast<long long>(count.other_tokens), count.worst);
  EXPECT_LE(count.other_tokens * 300, count.rows + 300);
}

constexpr uint32_t kAll = 1023;

TEST(SampleTest, Small) { TestSample({{0, 512}, {1, 512}, {3, 1000}, {5, 37}}, {0, kTemperature, kAll}); }
TEST(SampleTest, Greedy) {
  TestSample({{1, 5}, {17, 512}, {64, 4096}, {33, 32000}, {9, 50257}, {4, 151936}},
             {0, kTop, kPenalties, kBias | kRaw, kMask, kMask | kTop | kRaw, kTarget | kTop});
}
TEST(SampleTest, Filters) {
  const std::vector<uint32_t> each = {kTemperature,
                                      kTemperature | kTopK,
                                      kTemperature | kTopP,
                                      kTemperature | kMinP,
                                      kTemperature | kTopK | kTopP | kMinP,
                                      kTemperature | kMask | kTopK | kTopP};
  TestSample({{65, 512}, {64, 4096}, {40, 32000}, {9, 50257}}, each);
}
TEST(SampleTest, Everything) {
  TestSample({{2, 9}, {300, 512}, {256, 4096}, {64, 32000}, {16, 50257}, {8, 151936}}, {kAll, kAll & ~kTop});
}
// A row's results are the same bits whatever the other rows are.
TEST(SampleTest, RowsAlone) {
  Random random;
  const Inputs in = MakeInputs(24, 4096, kAll, false, random);
  const Results all = OnGpu(in, "all");
  for (int64_t r = 0; r < in.rows(); ++r) {
    Inputs one = in;
    one.logits.assign(in.logits.begin() + r * in.vocab, in.logits.begin() + (r + 1) * in.vocab);
    one.params = {in.params[r], in.params[r + 1]};
    one.mask_of_row = {in.mask_of_row[r]};
    one.targets = {in.targets[r]};
    const Results alone = OnGpu(one, Text("row %d alone", static_cast<int>(r)));
    EXPECT_EQ(alone.tokens[0], all.tokens[r]) << r;
    EXPECT_TRUE(SameBits(alone.logprobs.data(), &all.logprobs[r], 1)) << r;
    EXPECT_TRUE(SameBits(alone.top_tokens.data(), &all.top_tokens[r * kMaxTopLogprobs], kMaxTopLogprobs)) << r;
    EXPECT_TRUE(SameBits(alone.top_logprobs.data(), &all.top_logprobs[r * kMaxTopLogprobs],
                         std::max(0, in.params[r].num_top_logprobs)))
        << r;
  }
}

}  // namespace
}  // namespace soloist
