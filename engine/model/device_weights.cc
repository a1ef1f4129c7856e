#include "engine/model/device_weights.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <functional>
#include <mutex>
#include <thread>
#include <utility>

#include "base/status.h"

namespace soloist {
namespace {

// One read into device memory: rows [0, rows) of a role.
struct Piece {
  WeightRole role;
  int64_t layer;
  int64_t expert;
  Tensor* tensor;
  DType dtype;
  int64_t rows;
  int64_t cols;
};

constexpr int64_t kAlignment = 64;

int64_t Bytes(const Piece& piece) {
  const int64_t bytes = piece.rows * piece.cols * DTypeBytes(piece.dtype);
  return (bytes + kAlignment - 1) / kAlignment * kAlignment;
}

// A share of a piece small enough that threads and the progress bar move evenly.
struct Chunk {
  const Piece* piece;
  int64_t row_begin;
  int64_t row_count;
};

absl::Status Read(const WeightSource& source, const Chunk& chunk) {
  const Piece& piece = *chunk.piece;
  const Tensor rows = piece.tensor->Rows(chunk.row_begin, chunk.row_count);
  if (piece.dtype == DType::kF32) {
    return source.Read(piece.role, piece.layer, piece.expert, chunk.row_begin, chunk.row_count, rows.as<float>());
  }
  return source.Read(piece.role, piece.layer, piece.expert, chunk.row_begin, chunk.row_count, rows.as<BFloat16>());
}

// Allocates one buffer for all pieces, points their tensors into it and reads them with `threads` threads. On a device
// whose memory the host cannot write, chunks will go through pinned staging here.
absl::Status ReadAll(std::vector<Piece>& pieces, const WeightSource& source, Device& device, int threads,
                     LoadProgress& progress, std::vector<Buffer>& storage) {
  int64_t total = 0;
  for (const Piece& piece : pieces) total += Bytes(piece);
  ASSIGN_OR_RETURN(Buffer buffer, device.Allocate(total));
  constexpr int64_t kChunkBytes = 4 << 20;
  std::vector<Chunk> chunks;
  char* at = static_cast<char*>(buffer.data());
  for (const Piece& piece : pieces) {
    *piece.tensor = {at, piece.dtype, piece.rows, piece.cols, piece.cols};
    at += Bytes(piece);
    const int64_t rows = std::max<int64_t>(1, kChunkBytes / (piece.cols * DTypeBytes(piece.dtype)));
    for (int64_t row = 0; row < piece.rows; row += rows) {
      chunks.push_back({&piece, row, std::min(rows, piece.rows - row)});
    }
  }
  storage.push_back(std::move(buffer));

  std::atomic<size_t> next{0};
  std::mutex mutex;
  absl::Status status;
  const auto work = [&] {
    for (size_t i = next++; i < chunks.size(); i = next++) {
      const absl::Status read = Read(source, chunks[i]);
      if (!read.ok()) {
        std::lock_guard lock(mutex);
        status.Update(read);
        next = chunks.size();
        return;
      }
      progress.loaded_bytes += chunks[i].row_count * chunks[i].piece->cols * DTypeBytes(chunks[i].piece->dtype);
    }
  };
  std::vector<std::thread> helpers;
  for (int i = 1; i < threads; ++i) helpers.emplace_back(work);
  work();
  for (std::thread& helper : helpers) helper.join();
  return status;
}

// cos and sin of position / theta^(2d / head_dim), in float32 as transformers computes them.
void FillRope(const ModelConfig& config, const Tensor& cos_sin) {
  const int64_t half = config.head_dim / 2;
  for (int64_t d = 0; d < half; ++d) {
    const float exponent = static_cast<float>(2 * d) / static_cast<float>(config.head_dim);
    const float frequency = 1.0f / std::pow(static_cast<float>(config.rope_theta), exponent);
    for (int64_t position = 0; position < cos_sin.rows; ++position) {
      const float angle = static_cast<float>(position) * frequency;
      cos_sin.row<float>(position)[d] = std::cos(angle);
      cos_sin.row<float>(position)[half + d] = std::sin(angle);
    }
  }
}

int64_t StorageBytes(const std::vector<Buffer>& storage) {
  int64_t bytes = 0;
  for (const Buffer& buffer : storage) bytes += buffer.bytes();
  return bytes;
}

}  // namespace

int64_t SharedWeights::bytes() const { return StorageBytes(storage); }
int64_t ExpertWeights::bytes() const { return StorageBytes(storage); }

absl::StatusOr<SharedWeights> LoadSharedWeights(const ModelConfig& c, const WeightSource& source, int64_t max_positions,
                                                Device& device, int threads, LoadProgress& progress) {
  SharedWeights weights;
  weights.layers.resize(c.num_layers);
  const int64_t hidden = c.hidden_size, q = int64_t{c.num_heads} * c.head_dim,
                kv = int64_t{c.num_kv_heads} * c.head_dim;
  std::vector<Piece> pieces = {
      {WeightRole::kEmbedding, 0, 0, &weights.embedding, DType::kBF16, c.vocab_size, hidden},
      {WeightRole::kFinalNorm, 0, 0, &weights.final_norm, DType::kF32, 1, hidden},
  };
  if (!c.tie_word_embeddings) {
    pieces.push_back({WeightRole::kLmHead, 0, 0, &weights.lm_head, DType::kBF16, c.vocab_size, hidden});
  }
  for (int64_t l = 0; l < c.num_layers; ++l) {
    LayerWeights& w = weights.layers[l];
    pieces.push_back({WeightRole::kAttentionNorm, l, 0, &w.attention_norm, DType::kF32, 1, hidden});
    pieces.push_back({WeightRole::kQkv, l, 0, &w.qkv, DType::kBF16, q + 2 * kv, hidden});
    pieces.push_back({WeightRole::kAttentionOutput, l, 0, &w.attention_output, DType::kBF16, hidden, q});
    pieces.push_back({WeightRole::kMoeNorm, l, 0, &w.moe_norm, DType::kF32, 1, hidden});
    pieces.push_back({WeightRole::kRouter, l, 0, &w.router, DType::kBF16, c.num_experts, hidden});
  }
  RETURN_IF_ERROR(ReadAll(pieces, source, device, threads, progress, weights.storage));
  if (c.tie_word_embeddings) weights.lm_head = weights.embedding;
  ASSIGN_OR_RETURN(Buffer rope, device.Allocate(max_positions * c.head_dim * 4));
  weights.cos_sin = rope.View<float>(max_positions, c.head_dim);
  weights.storage.push_back(std::move(rope));
  FillRope(c, weights.cos_sin);
  return weights;
}

absl::StatusOr<ExpertWeights> LoadExpertWeights(const ModelConfig& c, const WeightSource& source,
                                                const std::vector<int>& experts, Device& device, int threads,
                                                LoadProgress& progress) {
  ExpertWeights weights;
  weights.layers.resize(c.num_layers);
  const int64_t inner = c.expert_hidden_size, rows_in = inner * (c.activation == Activation::kSiluGated ? 2 : 1);
  std::vector<Piece> pieces;
  for (int64_t l = 0; l < c.num_layers; ++l) {
    ExpertWeights::Layer& layer = weights.layers[l];
    layer.w_in.resize(experts.size());
    layer.w_out.resize(experts.size());
    for (size_t i = 0; i < experts.size(); ++i) {
      pieces.push_back(
          {WeightRole::kExpertGateUp, l, experts[i], &layer.w_in[i], DType::kBF16, rows_in, c.hidden_size});
      pieces.push_back({WeightRole::kExpertDown, l, experts[i], &layer.w_out[i], DType::kBF16, c.hidden_size, inner});
    }
  }
  if (pieces.empty()) return weights;
  RETURN_IF_ERROR(ReadAll(pieces, source, device, threads, progress, weights.storage));
  return weights;
}

}  // namespace soloist
