#include "tests/gpu/forced_worker.h"

#include <algorithm>
#include <cmath>
#include <numeric>
#include <utility>

#include "base/check.h"
#include "base/status.h"
#include "engine/comm/communicator.h"
#include "engine/model/device_weights.h"
#include "gtest/gtest.h"

namespace soloist {
namespace {

// More than any difference of logits.
constexpr float kForce = 1e6f;

}  // namespace

bool SameExperts(const ModelConfig& config, const Forced& a, const Forced& b, int64_t i, int64_t positions) {
  const int64_t top_k = config.experts_per_token;
  for (int64_t layer = 0; layer < config.num_layers; ++layer) {
    const int64_t at = (layer * positions + i) * top_k;
    if (!std::is_permutation(&a.experts[at], &a.experts[at] + top_k, &b.experts[at])) return false;
  }
  return true;
}

std::unique_ptr<ForcedWorker> ForcedWorker::Create(const ModelConfig& config, const WeightSource& source,
                                                   const ForcedOptions& options) {
  std::unique_ptr<ForcedWorker> forced(new ForcedWorker);
  forced->config_ = config;
  forced->options_ = options;
  const auto build = [&]() -> absl::Status {
    ASSIGN_OR_RETURN(forced->factory_, CreateDeviceFactory(options.device));
    ASSIGN_OR_RETURN(auto device, forced->factory_->CreateDevice(0));
    RETURN_IF_ERROR(device->BindThread());
    LoadProgress progress;
    ASSIGN_OR_RETURN(forced->shared_, LoadSharedWeights(config, source, options.max_model_len, *device, 2, progress));
    std::vector<int> all(config.num_experts);
    std::iota(all.begin(), all.end(), 0);
    ASSIGN_OR_RETURN(auto experts, LoadExpertWeights(config, source, all, *device, 2, progress));
    auto comm = CreateSelfCommunicator(*device);
    const int32_t blocks = (options.max_model_len + options.block_size - 1) / options.block_size;
    forced->limits_ = {.vocab_size = static_cast<int32_t>(config.vocab_size),
                       .max_model_len = options.max_model_len,
                       .num_blocks = 48 * blocks,
                       .block_size = options.block_size,
                       .max_tokens = options.max_tokens,
                       .max_sequences = options.max_sequences};
    ASSIGN_OR_RETURN(forced->worker_,
                     Worker::Create(config,
                                    {.limits = forced->limits_,
                                     .kv_dtype = options.kv_dtype,
                                     .expert_rank = std::vector<int>(all.size(), 0),
                                     .profile_every = options.graphs ? 0 : 1},
                                    forced->shared_, std::move(experts), std::move(device), std::move(comm)));
    RETURN_IF_ERROR(forced->worker_->WarmUp(nullptr));
    ASSIGN_OR_RETURN(forced->stream_, forced->worker_->device().CreateStream());
    return absl::OkStatus();
  };
  const absl::Status status = build();
  if (status.ok()) return forced;
  ADD_FAILURE() << status.ToString();
  return nullptr;
}

std::unique_ptr<ForcedWorker> ForcedWorker::Load(const std::string& model_dir, const ForcedOptions& options) {
  auto config = LoadModelConfig(model_dir);
  if (!config.ok()) {
    ADD_FAILURE() << config.status().ToString();
    return nullptr;
  }
  auto source = OpenCheckpointSource(*config, model_dir);
  if (!source.ok()) {
    ADD_FAILURE() << source.status().ToString();
    return nullptr;
  }
  return Create(*config, **source, options);
}

void ForcedWorker::AddRows(HomePlanParts& parts, const std::vector<int32_t>& tokens, int32_t begin, int32_t end,
                           int32_t first_block) const {
  const int32_t size = limits_.block_size;
  if (parts.query_starts.empty()) parts.query_starts.push_back(0);
  for (int32_t i = begin; i < end; ++i) {
    parts.token_ids.push_back(tokens[i]);
    parts.positions.push_back(i);
    parts.slot_mapping.push_back((first_block + i / size) * size + i % size);
  }
  parts.query_starts.push_back(static_cast<int32_t>(parts.token_ids.size()));
  parts.seq_lens.push_back(end);
  parts.max_blocks = std::max(parts.max_blocks, (end + size - 1) / size);
  parts.block_tables.push_back(first_block);  // the table itself: in Run
}

HomeResult ForcedWorker::Run(HomePlanParts parts) {
  const std::vector<int32_t> first_blocks = std::exchange(parts.block_tables, {});
  for (size_t s = 0; s < first_blocks.size(); ++s) {
    const int32_t used = (parts.seq_lens[s] + limits_.block_size - 1) / limits_.block_size;
    for (int32_t b = 0; b < parts.max_blocks; ++b) {
      parts.block_tables.push_back(b < used ? first_blocks[s] + b : 0);
    }
  }
  const auto tokens = static_cast<int32_t>(parts.token_ids.size());
  auto result = worker_->Execute(HomePlan(parts, ++step_, tokens, 0));
  if (!result.ok()) {
    ADD_FAILURE() << result.status().ToString();
    return {};
  }
  return *std::move(result);
}

Forced ForcedWorker::Logits(const std::vector<int32_t>& tokens, int32_t chunk) {
  const auto size = static_cast<int32_t>(tokens.size());
  const int64_t layers = config_.num_layers, top_k = config_.experts_per_token;
  chunk = std::min(chunk, limits_.max_sequences);  // every row is a logit row
  Forced all;
  all.experts.resize(layers * size * top_k);
  for (int32_t begin = 0; begin < size; begin += chunk) {
    const int32_t end = std::min(size, begin + chunk);
    HomePlanParts parts;
    AddRows(parts, tokens, begin, end, 1);
    for (int32_t i = begin; i < end; ++i) {
      parts.logit_rows.push_back(i - begin);
      parts.sampling.push_back({.position = i + 1, .return_logits = 1});
    }
    const HomeResult result = Run(std::move(parts));
    all.logits.insert(all.logits.end(), result.raw_logits.begin(), result.raw_logits.end());
    const Transformer& transformer = worker_->transformer();
    const Tensor routed = transformer.routed_experts();
    for (int64_t layer = 0; layer < layers; ++layer) {
      const Tensor rows = routed.Rows(layer * transformer.limits().max_tokens, end - begin);
      worker_->device().Copy(&all.experts[(layer * size + begin) * top_k], rows.data, rows.bytes(), *stream_);
    }
    const absl::Status copied = stream_->Synchronize();
    EXPECT_TRUE(copied.ok()) << copied.ToString();
  }
  return all;
}

std::vector<std::vector<float>> ForcedWorker::Logprobs(const std::vector<std::vector<int32_t>>& sequences,
                                                       const std::vector<int32_t>& first,
                                                       const std::vector<int32_t>& decode_from, int32_t chunk) {
  std::vector<std::vector<float>> logprobs(sequences.size());
  std::vector<int32_t> done(sequences.size(), 0);  // positions that have run
  const int32_t blocks = (limits_.max_model_len + limits_.block_size - 1) / limits_.block_size;
  chunk = std::min({chunk, limits_.max_tokens, limits_.max_sequences});
  CHECK_LE(static_cast<int32_t>(sequences.size()) * blocks, limits_.num_blocks);
  while (true) {
    // Decodes first, then chunks, as the scheduler does.
    HomePlanParts parts;
    std::vector<size_t> row_sequence;
    int32_t room = chunk;
    const auto add = [&](size_t s, int32_t rows) {
      const auto& tokens = sequences[s];
      const int32_t before = static_cast<int32_t>(parts.token_ids.size());
      AddRows(parts, tokens, done[s], done[s] + rows, static_cast<int32_t>(s) * blocks);
      for (int32_t i = done[s]; i < done[s] + rows; ++i) {
        if (i + 1 < first[s] || i + 1 >= std::ssize(tokens)) continue;
        parts.logit_rows.push_back(before + i - done[s]);
        parts.sampling.push_back({.position = i + 1, .bias_begin = static_cast<int32_t>(parts.bias.size())});
        parts.bias.push_back({tokens[i + 1], kForce});
        row_sequence.push_back(s);
      }
      done[s] += rows;
      room -= rows;
    };
    const auto left = [&](size_t s) { return static_cast<int32_t>(sequences[s].size()) - 1 - done[s]; };
    std::vector<size_t> decodes, chunks;
    for (size_t s = 0; s < sequences.size(); ++s) {
      if (left(s) > 0) (done[s] >= decode_from[s] ? decodes : chunks).push_back(s);
    }
    if (decodes.empty() && chunks.empty()) return logprobs;
    for (const size_t s : decodes) {
      if (room > 0) add(s, 1);
    }
    for (const size_t s : chunks) {
      if (room > 0) add(s, std::min({room, left(s), decode_from[s] - done[s]}));
    }
    const HomeResult result = Run(std::move(parts));
    if (result.logprobs.size() != row_sequence.size()) {
      ADD_FAILURE() << result.logprobs.size() << " rows came back, " << row_sequence.size() << " were asked for";
      return logprobs;
    }
    for (size_t r = 0; r < row_sequence.size(); ++r) {
      auto& own = logprobs[row_sequence[r]];
      const auto& tokens = sequences[row_sequence[r]];
      const int32_t wanted = tokens[first[row_sequence[r]] + std::ssize(own)];
      EXPECT_EQ(result.tokens[r], wanted) << "the bias forces it";
      own.push_back(result.logprobs[r]);
    }
  }
}

}  // namespace soloist
