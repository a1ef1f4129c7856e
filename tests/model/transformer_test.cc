// Weights and the transformer on a device whose memory the host cannot touch, and in padded buckets: the same bits as
// on the CPU's own.
#include "engine/model/transformer.h"

#include <algorithm>
#include <cstring>
#include <map>
#include <memory>
#include <numeric>
#include <string>
#include <utility>
#include <vector>

#include "engine/comm/communicator.h"
#include "engine/comm/dispatcher.h"
#include "engine/model/config.h"
#include "engine/model/device_weights.h"
#include "engine/model/footprint.h"
#include "engine/model/weights.h"
#include "gtest/gtest.h"
#include "tests/kernels/opaque_device.h"

namespace soloist {
namespace {

constexpr int64_t kPositions = 64;
constexpr int kBlocks = 8, kBlockSize = 4;

// A rank of one with all experts.
class Rank {
 public:
  Rank(const ModelConfig& config, const WeightSource& source, bool opaque, int64_t masked_max_tokens)
      : config_(config) {
    factory_ = CreateDeviceFactory({.kind = "cpu", .cpu_threads = 2}).value();
    device_ = factory_->CreateDevice(0).value();
    if (opaque) device_ = CreateOpaqueDevice(std::move(device_));
    stream_ = device_->CreateStream().value();
    comm_ = CreateSelfCommunicator(*device_);
    std::vector<int> all(config.num_experts);
    std::iota(all.begin(), all.end(), 0);
    LoadProgress progress;
    shared_ = LoadSharedWeights(config, source, kPositions, *device_, 3, progress).value();
    experts_ = LoadExpertWeights(config, source, all, *device_, 3, progress).value();
    EXPECT_EQ(progress.loaded_bytes, SharedWeightBytes(config) + ExpertWeightBytes(config, config.num_experts));
    dispatcher_ = CreateTokenDispatcher({.hidden_size = static_cast<int>(config.hidden_size),
                                         .num_experts = static_cast<int>(config.num_experts),
                                         .top_k = static_cast<int>(config.experts_per_token),
                                         .max_tokens_per_rank = 16,
                                         .dtype = device_->activation_dtype(),
                                         .expert_rank = std::vector<int>(config.num_experts, 0),
                                         .masked_max_tokens = masked_max_tokens},
                                        *device_, *comm_)
                      .value();
    transformer_ =
        Transformer::Create(config, {.max_tokens = 16, .max_logit_rows = 4}, shared_, experts_, *device_, *dispatcher_)
            .value();
    const int64_t half = int64_t{kBlocks} * kBlockSize * config.num_kv_heads * config.head_dim * 4;
    for (int64_t layer = 0; layer < config.num_layers; ++layer) {
      for (int i = 0; i < 2; ++i) memory_.push_back(device_->Allocate(half).value());
      kv_.push_back({.keys = memory_[2 * layer].data(),
                     .values = memory_[2 * layer + 1].data(),
                     .num_blocks = kBlocks,
                     .num_kv_heads = static_cast<int>(config.num_kv_heads),
                     .block_size = kBlockSize,
                     .head_dim = static_cast<int>(config.head_dim)});
    }
  }

  struct Result {
    std::vector<float> logits;
    std::vector<int32_t> counts;
    std::map<std::string, int> groups;  // calls of the hook
  };
  // One decode at position 0, one chunk of 5, in a batch that is padded by `spare` rows, sequences and logit rows.
  Result Step(int spare) {
    std::vector<int32_t> tokens = {7, 1, 2, 3, 4, 5}, positions = {0, 0, 1, 2, 3, 4}, slots = {12, 4, 5, 6, 7, 28};
    std::vector<int32_t> starts = {0, 1, 6}, lens = {1, 5}, tables = {3, 0, 1, 7}, logit_rows = {0, 5};
    const std::vector<int32_t> num_rows = {6};
    for (int i = 0; i < spare; ++i) {
      tokens.push_back(0);
      positions.push_back(0);
      slots.push_back(-1);
      starts.push_back(starts.back() + 1);
      lens.push_back(0);
      tables.insert(tables.end(), {0, 0});
      logit_rows.push_back(0);
    }
    std::vector<Buffer> uploads;
    const auto upload = [&](const std::vector<int32_t>& host) {
      const auto bytes = static_cast<int64_t>(host.size() * 4);
      uploads.push_back(device_->Allocate(bytes).value());
      device_->Copy(uploads.back().data(), host.data(), bytes, *stream_);
      return static_cast<const int32_t*>(uploads.back().data());
    };
    Result result;
    transformer_->set_group_hook([&](const char* group, int) { ++result.groups[group]; });
    const auto n = static_cast<int64_t>(tokens.size());
    const absl::Status status =
        transformer_->Forward({.capacity = {.max_tokens = std::min<int64_t>(16, n + spare)},
                               .micro_batches = {{.num_tokens = n,
                                                  .num_sequences = static_cast<int>(lens.size()),
                                                  .num_decodes = 1,
                                                  .max_query_rows = 5,
                                                  .max_seq_len = 5,
                                                  .query_starts = upload(starts),
                                                  .seq_lens = upload(lens),
                                                  .block_tables = upload(tables)}},
                               .max_blocks = 2,
                               .num_logit_rows = static_cast<int>(logit_rows.size()),
                               .num_rows = spare > 0 ? upload(num_rows) : nullptr,
                               .token_ids = upload(tokens),
                               .positions = upload(positions),
                               .slot_mapping = upload(slots),
                               .logit_rows = upload(logit_rows)},
                              kv_, nullptr, *stream_);
    EXPECT_EQ(status, absl::OkStatus());
    result.logits.resize(2 * config_.vocab_size);
    result.counts.resize(config_.num_layers * config_.num_experts);
    Download(transformer_->logits(2).data, result.logits);
    Download(transformer_->expert_counts().data, result.counts);
    return result;
  }
  template <typename T>
  void Download(const void* from, std::vector<T>& to) {
    device_->Copy(to.data(), from, static_cast<int64_t>(to.size() * sizeof(T)), *stream_);
    CHECK_OK(stream_->Synchronize());
  }
  const SharedWeights& shared() const { return shared_; }
  const ExpertWeights& experts() const { return experts_; }

 private:
  const ModelConfig config_;
  std::unique_ptr<DeviceFactory> factory_;
  std::unique_ptr<Device> device_;
  std::unique_ptr<Stream> stream_;
  std::unique_ptr<Communicator> comm_;
  SharedWeights shared_;
  ExpertWeights experts_;
  std::unique_ptr<TokenDispatcher> dispatcher_;
  std::unique_ptr<Transformer> transformer_;
  std::vector<Buffer> memory_;
  std::vector<KvLayer> kv_;
};

// Parameter: model; dummy weights or its checkpoint.
class OpaqueDeviceTest : public testing::TestWithParam<const char*> {
 protected:
  void SetUp() override {
    config_ = LoadModelConfig(std::string("models/") + GetParam()).value();
    source_ = std::string(GetParam()) == "tiny" ? OpenCheckpointSource(config_, "models/tiny").value()
                                                : CreateDummySource(config_, 3).value();
  }
  ModelConfig config_;
  std::unique_ptr<const WeightSource> source_;
};
INSTANTIATE_TEST_SUITE_P(Models, OpaqueDeviceTest, testing::Values("tiny", "paper16-small"),
                         [](const auto& info) { return std::string(info.param) == "tiny" ? "Checkpoint" : "Dummy"; });

TEST_P(OpaqueDeviceTest, WeightsArriveByStaging) {
  Rank plain(config_, *source_, /*opaque=*/false, 0), opaque(config_, *source_, /*opaque=*/true, 0);
  const auto compare = [&](const std::vector<Buffer>& a, const std::vector<Buffer>& b) {
    ASSERT_EQ(a.size(), b.size());
    for (size_t i = 0; i < a.size(); ++i) {
      ASSERT_EQ(a[i].bytes(), b[i].bytes());
      std::vector<uint8_t> arrived(static_cast<size_t>(b[i].bytes()));
      opaque.Download(b[i].data(), arrived);
      EXPECT_EQ(std::memcmp(a[i].data(), arrived.data(), arrived.size()), 0);
    }
  };
  compare(plain.shared().storage, opaque.shared().storage);
  compare(plain.experts().storage, opaque.experts().storage);
}

TEST_P(OpaqueDeviceTest, ForwardSameBits) {
  const Rank::Result expected = Rank(config_, *source_, /*opaque=*/false, 16).Step(0);
  for (int64_t layer = 0; layer < config_.num_layers; ++layer) {
    const auto begin = expected.counts.begin() + layer * config_.num_experts;
    EXPECT_EQ(std::accumulate(begin, begin + config_.num_experts, int64_t{0}), 6 * config_.experts_per_token);
  }
  const int layers = static_cast<int>(config_.num_layers);
  const std::map<std::string, int> groups = {{"embed", 1},          {"attention_linear", 2 * layers},
                                             {"attention", layers}, {"router", layers},
                                             {"dispatch", layers},  {"expert", layers},
                                             {"combine", layers},   {"head", 1}};
  EXPECT_EQ(expected.groups, groups);
  for (const int64_t masked_max_tokens : {0, 16}) {
    Rank opaque(config_, *source_, /*opaque=*/true, masked_max_tokens);
    for (const int spare : {2, 0, 1}) {
      const Rank::Result result = opaque.Step(spare);
      EXPECT_EQ(result.logits, expected.logits) << masked_max_tokens << " " << spare;
      EXPECT_EQ(result.counts, expected.counts) << masked_max_tokens << " " << spare;
    }
  }
}

// An error of the source ends the load, whatever is in flight.
TEST_P(OpaqueDeviceTest, ErrorsAreTheSources) {
  class Failing final : public WeightSource {
   public:
    explicit Failing(const WeightSource& source) : source_(source) {}
    absl::Status Read(WeightRole role, int64_t layer, int64_t expert, int64_t begin, int64_t count,
                      BFloat16* out) const override {
      if (role == WeightRole::kRouter && layer == 1) return absl::DataLossError("the disk is gone");
      return source_.Read(role, layer, expert, begin, count, out);
    }
    absl::Status Read(WeightRole role, int64_t layer, int64_t expert, int64_t begin, int64_t count,
                      float* out) const override {
      return source_.Read(role, layer, expert, begin, count, out);
    }

   private:
    const WeightSource& source_;
  };
  const auto factory = CreateDeviceFactory({.kind = "cpu", .cpu_threads = 1}).value();
  for (const bool opaque : {false, true}) {
    auto device = factory->CreateDevice(0).value();
    if (opaque) device = CreateOpaqueDevice(std::move(device));
    LoadProgress progress;
    const auto weights = LoadSharedWeights(config_, Failing(*source_), kPositions, *device, 3, progress);
    EXPECT_EQ(weights.status().code(), absl::StatusCode::kDataLoss) << weights.status();
  }
}

}  // namespace
}  // namespace soloist
