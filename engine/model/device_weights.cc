#include "engine/model/device_weights.h"

#include <algorithm>
#include <cmath>
#include <functional>
#include <memory>
#include <mutex>
#include <optional>
#include <thread>
#include <utility>

#include "base/status.h"
#include "kernels/ops.h"

namespace soloist {
namespace {

// One matrix in device memory: rows [0, rows) of a role.
struct Piece {
  WeightRole role;
  int64_t layer;
  int64_t expert;
  Tensor* tensor;
  DType dtype;
  int64_t rows;
  int64_t cols;
};

constexpr int64_t kAlignment = 256;

int64_t Bytes(const Piece& piece) {
  const int64_t bytes = piece.rows * piece.cols * DTypeBytes(piece.dtype);
  return (bytes + kAlignment - 1) / kAlignment * kAlignment;
}

// A share of a piece small enough that threads and the progress bar move evenly.
struct Chunk {
  const Piece* piece;
  int64_t row_begin;
  int64_t row_count;
  int64_t bytes() const { return row_count * piece->cols * DTypeBytes(piece->dtype); }
  void* destination() const { return piece->tensor->Rows(row_begin, row_count).data; }
};

constexpr int64_t kChunkBytes = 8 << 20;

// Chunks in the order of the pieces.
std::vector<Chunk> Split(const std::vector<const Piece*>& pieces) {
  std::vector<Chunk> chunks;
  for (const Piece* piece : pieces) {
    const int64_t rows = std::max<int64_t>(1, kChunkBytes / (piece->cols * DTypeBytes(piece->dtype)));
    for (int64_t row = 0; row < piece->rows; row += rows) {
      chunks.push_back({piece, row, std::min(rows, piece->rows - row)});
    }
  }
  return chunks;
}

absl::Status Read(const WeightSource& source, const Chunk& chunk, void* to) {
  const Piece& p = *chunk.piece;
  return p.dtype == DType::kF32
             ? source.Read(p.role, p.layer, p.expert, chunk.row_begin, chunk.row_count, static_cast<float*>(to))
             : source.Read(p.role, p.layer, p.expert, chunk.row_begin, chunk.row_count, static_cast<BFloat16*>(to));
}

// One thread's way to a device whose memory the host cannot write: while one pinned buffer is copied, the other is
// read into.
class StagingLane {
 public:
  static absl::StatusOr<StagingLane> Create(Device& device, int64_t buffer_bytes) {
    StagingLane lane;
    ASSIGN_OR_RETURN(lane.stream_, device.CreateStream());
    for (Half& half : lane.halves_) {
      ASSIGN_OR_RETURN(half.pinned, device.AllocatePinned(buffer_bytes));
      ASSIGN_OR_RETURN(half.copied, device.CreateEvent());
      device.Record(*half.copied, *lane.stream_);
    }
    return lane;
  }

  absl::Status Load(const WeightSource& source, const Chunk& chunk, Device& device) {
    Half& half = halves_[next_];
    next_ = 1 - next_;
    RETURN_IF_ERROR(device.BindThread());
    RETURN_IF_ERROR(half.copied->Wait());
    RETURN_IF_ERROR(Read(source, chunk, half.pinned.data()));
    device.Copy(chunk.destination(), half.pinned.data(), chunk.bytes(), *stream_);
    device.Record(*half.copied, *stream_);
    return absl::OkStatus();
  }
  Stream& stream() { return *stream_; }

 private:
  struct Half {
    Buffer pinned;
    std::unique_ptr<Event> copied;
  };
  std::unique_ptr<Stream> stream_;
  Half halves_[2];
  int next_ = 0;
};

// Calls load(thread, chunk) for every chunk, with `threads` threads; the first error ends it.
absl::Status ForChunks(const std::vector<Chunk>& chunks, int threads, LoadProgress& progress,
                       const std::function<absl::Status(int thread, const Chunk& chunk)>& load) {
  std::atomic<size_t> next{0};
  std::mutex mutex;
  absl::Status status;
  const auto work = [&](int thread) {
    for (size_t i = next++; i < chunks.size(); i = next++) {
      const absl::Status loaded = load(thread, chunks[i]);
      if (!loaded.ok()) {
        std::lock_guard lock(mutex);
        status.Update(loaded);
        next = chunks.size();
        return;
      }
      progress.loaded_bytes += chunks[i].bytes();
    }
  };
  std::vector<std::thread> helpers;
  for (int i = 1; i < threads; ++i) helpers.emplace_back(work, i);
  work(0);
  for (std::thread& helper : helpers) helper.join();
  return status;
}

// On a device whose memory the host cannot write.
absl::Status LoadStaged(const std::vector<Piece>& pieces, const WeightSource& source, Device& device, int threads,
                        LoadProgress& progress) {
  ASSIGN_OR_RETURN(const std::unique_ptr<Stream> fills, device.CreateStream());
  std::vector<const Piece*> read;
  for (const Piece& piece : pieces) {
    const std::optional<UniformWeights> uniform = source.Uniform(piece.role, piece.layer, piece.expert);
    if (!uniform.has_value()) {
      read.push_back(&piece);
      continue;
    }
    device.ops().FillUniform(uniform->key, uniform->scale, 0, *piece.tensor, *fills);
    progress.loaded_bytes += piece.tensor->bytes();
  }
  const std::vector<Chunk> chunks = Split(read);
  int64_t largest = 0;
  for (const Chunk& chunk : chunks) largest = std::max(largest, chunk.bytes());
  threads = static_cast<int>(std::min<int64_t>(threads, std::ssize(chunks)));
  std::vector<StagingLane> lanes;
  for (int i = 0; i < threads; ++i) {
    ASSIGN_OR_RETURN(StagingLane lane, StagingLane::Create(device, largest));
    lanes.push_back(std::move(lane));
  }
  absl::Status status = ForChunks(chunks, threads, progress, [&](int thread, const Chunk& chunk) {
    return lanes[thread].Load(source, chunk, device);
  });
  // Whatever has happened, the copies must have left the pinned buffers before these go.
  for (StagingLane& lane : lanes) status.Update(lane.stream().Synchronize());
  status.Update(fills->Synchronize());
  return status;
}

// Allocates one buffer for all pieces, points their tensors into it and loads them with `threads` threads.
absl::Status LoadAll(std::vector<Piece>& pieces, const WeightSource& source, Device& device, int threads,
                     LoadProgress& progress, std::vector<Buffer>& storage) {
  int64_t total = 0;
  for (const Piece& piece : pieces) total += Bytes(piece);
  RETURN_IF_ERROR(device.BindThread());
  ASSIGN_OR_RETURN(Buffer buffer, device.Allocate(total));
  char* at = static_cast<char*>(buffer.data());
  std::vector<const Piece*> all;
  for (const Piece& piece : pieces) {
    *piece.tensor = {at, piece.dtype, piece.rows, piece.cols, piece.cols};
    at += Bytes(piece);
    all.push_back(&piece);
  }
  storage.push_back(std::move(buffer));
  if (!device.host_accessible()) return LoadStaged(pieces, source, device, threads, progress);
  return ForChunks(Split(all), threads, progress,
                   [&](int /*thread*/, const Chunk& chunk) { return Read(source, chunk, chunk.destination()); });
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
  RETURN_IF_ERROR(LoadAll(pieces, source, device, threads, progress, weights.storage));
  if (c.tie_word_embeddings) weights.lm_head = weights.embedding;
  ASSIGN_OR_RETURN(Buffer rope, device.Allocate(max_positions * c.head_dim * 4));
  weights.cos_sin = rope.View<float>(max_positions, c.head_dim);
  if (device.host_accessible()) {
    FillRope(c, weights.cos_sin);
  } else {
    std::vector<float> table(static_cast<size_t>(max_positions * c.head_dim));
    FillRope(c, MakeTensor(table.data(), max_positions, c.head_dim));
    ASSIGN_OR_RETURN(const std::unique_ptr<Stream> stream, device.CreateStream());
    device.Copy(rope.data(), table.data(), rope.bytes(), *stream);
    RETURN_IF_ERROR(stream->Synchronize());
  }
  weights.storage.push_back(std::move(rope));
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
  RETURN_IF_ERROR(LoadAll(pieces, source, device, threads, progress, weights.storage));
  return weights;
}

}  // namespace soloist
