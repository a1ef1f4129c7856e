#include "engine/model/weights.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <type_traits>
#include <vector>

#include "base/check.h"
#include "base/status.h"
#include "engine/model/checkpoint.h"
#include "engine/model/convert.h"
#include "engine/model/families.h"
#include "kernels/uniform.h"

namespace soloist {
namespace {

void Assign(float value, float& out) { out = value; }
void Assign(float value, BFloat16& out) { out = ToBFloat16(value); }

// n elements at `from` (no alignment is promised by the format) to `out`.
template <typename T>
void Convert(StoredType type, const char* from, int64_t n, T* out) {
  if (type == StoredType::kF32) {
    if constexpr (std::is_same_v<T, float>) {
      std::memcpy(out, from, n * 4);
    } else {
      for (int64_t i = 0; i < n; ++i) {
        float value;
        std::memcpy(&value, from + 4 * i, 4);
        Assign(value, out[i]);
      }
    }
    return;
  }
  if (type == StoredType::kBF16 && std::is_same_v<T, BFloat16>) {
    std::memcpy(out, from, n * 2);
    return;
  }
  for (int64_t i = 0; i < n; ++i) {
    uint16_t bits;
    std::memcpy(&bits, from + 2 * i, 2);
    Assign(type == StoredType::kBF16 ? ToFloat(BFloat16{bits}) : HalfToFloat(bits), out[i]);
  }
}

int64_t StoredBytes(StoredType type) { return type == StoredType::kF32 ? 4 : 2; }

class CheckpointSource final : public WeightSource {
 public:
  CheckpointSource(const ModelConfig& config, const ModelFamily& family, Checkpoint checkpoint)
      : config_(config), family_(family), checkpoint_(std::move(checkpoint)) {}

  // Looks every tensor up once, so that a bad checkpoint is refused before any byte of it is loaded.
  absl::Status CheckAll() const {
    for (const WeightRole role : {WeightRole::kEmbedding, WeightRole::kLmHead, WeightRole::kFinalNorm}) {
      RETURN_IF_ERROR(Check(role, 0, 0));
    }
    for (int64_t layer = 0; layer < config_.num_layers; ++layer) {
      for (const WeightRole role : {WeightRole::kAttentionNorm, WeightRole::kQkv, WeightRole::kAttentionOutput,
                                    WeightRole::kMoeNorm, WeightRole::kRouter}) {
        RETURN_IF_ERROR(Check(role, layer, 0));
      }
      for (int64_t expert = 0; expert < config_.num_experts; ++expert) {
        RETURN_IF_ERROR(Check(WeightRole::kExpertGateUp, layer, expert));
        RETURN_IF_ERROR(Check(WeightRole::kExpertDown, layer, expert));
      }
    }
    return absl::OkStatus();
  }

  absl::Status Read(WeightRole role, int64_t layer, int64_t expert, int64_t begin, int64_t count,
                    BFloat16* out) const override {
    return ReadRows(role, layer, expert, begin, count, out);
  }
  absl::Status Read(WeightRole role, int64_t layer, int64_t expert, int64_t begin, int64_t count,
                    float* out) const override {
    return ReadRows(role, layer, expert, begin, count, out);
  }

 private:
  absl::Status Check(WeightRole role, int64_t layer, int64_t expert) const {
    for (const TensorPart& part : family_.parts(config_, role, layer, expert)) {
      RETURN_IF_ERROR(checkpoint_.Find(part.name, part.shape).status());
    }
    return absl::OkStatus();
  }

  template <typename T>
  absl::Status ReadRows(WeightRole role, int64_t layer, int64_t expert, int64_t begin, int64_t count, T* out) const {
    const int64_t cols = RoleShape(config_, role).second, end = begin + count;
    int64_t part_begin = 0;
    for (const TensorPart& part : family_.parts(config_, role, layer, expert)) {
      const int64_t first = std::max(begin, part_begin), last = std::min(end, part_begin + part.rows);
      if (first < last) {
        ASSIGN_OR_RETURN(const Checkpoint::Entry entry, checkpoint_.Find(part.name, part.shape));
        const int64_t row_bytes = cols * StoredBytes(entry.tensor->type);
        const int64_t row = first - part_begin + (part.index >= 0 ? part.index * part.rows : 0);
        const int64_t at = entry.tensor->begin + row * row_bytes;
        entry.file->WillNeed(at, (last - first) * row_bytes);
        Convert(entry.tensor->type, entry.file->Data(at), (last - first) * cols, out + (first - begin) * cols);
      }
      part_begin += part.rows;
    }
    CHECK_GE(part_begin, end);
    return absl::OkStatus();
  }

  const ModelConfig config_;
  const ModelFamily& family_;
  const Checkpoint checkpoint_;
};

class DummySource final : public WeightSource {
 public:
  DummySource(const ModelConfig& config, uint64_t seed) : config_(config), seed_(seed) {}

  absl::Status Read(WeightRole role, int64_t layer, int64_t expert, int64_t begin, int64_t count,
                    BFloat16* out) const override {
    return Fill(role, layer, expert, begin, count, out);
  }
  absl::Status Read(WeightRole role, int64_t layer, int64_t expert, int64_t begin, int64_t count,
                    float* out) const override {
    return Fill(role, layer, expert, begin, count, out);
  }

  std::optional<UniformWeights> Uniform(WeightRole role, int64_t layer, int64_t expert) const override {
    if (role == WeightRole::kFinalNorm || role == WeightRole::kAttentionNorm || role == WeightRole::kMoeNorm) {
      return std::nullopt;
    }
    if (role == WeightRole::kLmHead && config_.tie_word_embeddings) role = WeightRole::kEmbedding;
    const auto cols = static_cast<float>(RoleShape(config_, role).second);
    const uint64_t key = MixBits(MixBits(MixBits(MixBits(seed_) + static_cast<uint64_t>(role)) + layer) + expert);
    // Uniform in [-a, a) has variance a^2 / 3.
    return UniformWeights{key, role == WeightRole::kEmbedding ? std::sqrt(3.0f) : std::sqrt(3.0f / cols)};
  }

 private:
  template <typename T>
  absl::Status Fill(WeightRole role, int64_t layer, int64_t expert, int64_t begin, int64_t count, T* out) const {
    const int64_t cols = RoleShape(config_, role).second, first = begin * cols, last = (begin + count) * cols;
    const std::optional<UniformWeights> uniform = Uniform(role, layer, expert);
    if (!uniform.has_value()) {
      for (int64_t i = first; i < last; ++i) Assign(1.0f, out[i - first]);
      return absl::OkStatus();
    }
    // Elements are addressed absolutely, so that any split into rows gives the same values; one mix serves four.
    for (int64_t i = first; i < last;) {
      const uint64_t draw = MixBits(uniform->key + static_cast<uint64_t>(i) / 4);
      for (const int64_t end = std::min(last, i / 4 * 4 + 4); i < end; ++i) {
        Assign(UniformOfDraw(draw, i, uniform->scale), out[i - first]);
      }
    }
    return absl::OkStatus();
  }

  const ModelConfig config_;
  const uint64_t seed_;
};

}  // namespace

const char* RoleName(WeightRole role) {
  static constexpr const char* kNames[] = {
      "embedding",        "lm_head",  "final_norm", "attention_norm", "qkv",
      "attention_output", "moe_norm", "router",     "expert_gate_up", "expert_down"};
  return kNames[static_cast<int>(role)];
}

std::pair<int64_t, int64_t> RoleShape(const ModelConfig& c, WeightRole role) {
  const int64_t q = c.num_heads * c.head_dim, kv = c.num_kv_heads * c.head_dim;
  switch (role) {
    case WeightRole::kEmbedding:
    case WeightRole::kLmHead:
      return {c.vocab_size, c.hidden_size};
    case WeightRole::kFinalNorm:
    case WeightRole::kAttentionNorm:
    case WeightRole::kMoeNorm:
      return {1, c.hidden_size};
    case WeightRole::kQkv:
      return {q + 2 * kv, c.hidden_size};
    case WeightRole::kAttentionOutput:
      return {c.hidden_size, q};
    case WeightRole::kRouter:
      return {c.num_experts, c.hidden_size};
    case WeightRole::kExpertGateUp:
      return {c.expert_hidden_size * (c.activation == Activation::kSiluGated ? 2 : 1), c.hidden_size};
    case WeightRole::kExpertDown:
      return {c.hidden_size, c.expert_hidden_size};
  }
  return {0, 0};
}

absl::StatusOr<std::unique_ptr<const WeightSource>> OpenCheckpointSource(const ModelConfig& config,
                                                                         const std::string& model_dir) {
  ASSIGN_OR_RETURN(const ModelFamily* family, FindFamily(config.architecture));
  ASSIGN_OR_RETURN(Checkpoint checkpoint, Checkpoint::Open(model_dir));
  auto source = std::make_unique<CheckpointSource>(config, *family, std::move(checkpoint));
  RETURN_IF_ERROR(source->CheckAll());
  return source;
}

absl::StatusOr<std::unique_ptr<const WeightSource>> CreateDummySource(const ModelConfig& config, uint64_t seed) {
  return std::make_unique<DummySource>(config, seed);
}

}  // namespace soloist
