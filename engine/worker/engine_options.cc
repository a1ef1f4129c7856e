#include "engine/worker/engine_options.h"

#include <algorithm>
#include <filesystem>
#include <utility>

#include "base/status.h"
#include "engine/model/footprint.h"

namespace soloist {

EngineOptions WithDefaults(EngineOptions options) {
  const bool cuda = options.device.kind == "cuda";
  if (options.block_size == 0) options.block_size = cuda ? 64 : 16;
  if (options.max_tokens_per_step == 0) options.max_tokens_per_step = cuda ? 8192 : 512;
  if (options.memory_fraction == 0) options.memory_fraction = cuda ? 0.9 : 0.5;
  if (options.kv_dtype == "auto") options.kv_dtype = cuda ? "bf16" : "f32";
  return options;
}

absl::Status CheckEngineOptions(const EngineOptions& options, const ModelConfig& config) {
  const auto positive = [](const char* name, int64_t value) {
    return value >= 1 ? absl::OkStatus() : InvalidArgument("{} is {}, allowed: >= 1", name, value);
  };
  RETURN_IF_ERROR(positive("block_size", options.block_size));
  RETURN_IF_ERROR(positive("max_tokens_per_step", options.max_tokens_per_step));
  RETURN_IF_ERROR(positive("max_sequences", options.max_sequences));
  if (options.max_tokens_per_step < options.max_sequences) {
    return InvalidArgument("max_tokens_per_step is {}, less than max_sequences {}: decodes alone would not fit",
                           options.max_tokens_per_step, options.max_sequences);
  }
  if (options.max_model_len < 0 || options.max_model_len > config.max_position_embeddings) {
    return InvalidArgument("max_model_len is {}, allowed: 1 to the model's {} positions (0: all)",
                           options.max_model_len, config.max_position_embeddings);
  }
  if (options.masked_max_tokens < -1) {
    return InvalidArgument("masked_max_tokens is {}, allowed: >= 0, or -1: chosen", options.masked_max_tokens);
  }
  if (options.num_blocks < 0) return InvalidArgument("num_blocks is {}, allowed: >= 0", options.num_blocks);
  if (!(options.memory_fraction > 0 && options.memory_fraction <= 1)) {
    return InvalidArgument("memory_fraction is {}, allowed: (0, 1]", options.memory_fraction);
  }
  const bool cuda = options.device.kind == "cuda";
  if (options.kv_dtype != "bf16" && options.kv_dtype != (cuda ? "fp8_e4m3" : "f32")) {
    return InvalidArgument("kv_dtype is '{}', allowed on {}: {}, bf16", options.kv_dtype, options.device.kind,
                           cuda ? "fp8_e4m3" : "f32");
  }
  if (options.slice_ranks < 0 || (options.slice_ranks > 0 && options.num_ranks != 1)) {
    return InvalidArgument("slice of {} ranks with {} ranks: a slice is one rank", options.slice_ranks,
                           options.num_ranks);
  }
  if (options.slice_ranks > 0 && config.num_experts % options.slice_ranks != 0) {
    return InvalidArgument("slice of {} ranks: {} experts do not divide evenly", options.slice_ranks,
                           config.num_experts);
  }
  if (options.load_format != "auto" && options.load_format != "dummy") {
    return InvalidArgument("load_format is '{}', allowed: auto, dummy", options.load_format);
  }
  return absl::OkStatus();
}

absl::StatusOr<ExpertPlacement> PlaceExperts(const EngineOptions& options, const ModelConfig& config, int groups) {
  return options.expert_rank.empty() ? ExpertPlacement::Contiguous(static_cast<int>(config.num_experts), groups)
                                     : ExpertPlacement::FromMap(options.expert_rank, groups);
}

DType KvDType(std::string_view kv_dtype) {
  return kv_dtype == "bf16" ? DType::kBF16 : kv_dtype == "f32" ? DType::kF32 : DType::kF8E4M3;
}

absl::StatusOr<std::unique_ptr<const WeightSource>> OpenWeights(const ModelConfig& config, const std::string& model_dir,
                                                                const std::string& load_format, uint64_t dummy_seed) {
  return load_format == "dummy" ? CreateDummySource(config, dummy_seed) : OpenCheckpointSource(config, model_dir);
}

int64_t MaskedMaxTokens(const EngineOptions& options, const ModelConfig& config, const ExpertPlacement& placement) {
  constexpr int64_t kMost = 64, kChunkBytes = 16384;
  if (options.masked_max_tokens >= 0) return options.masked_max_tokens;
  if (options.device.kind == "cuda") return kMost;
  int64_t local_experts = 1;
  for (const int rank : placement.expert_rank()) {
    local_experts = std::max<int64_t>(local_experts, std::ssize(placement.ExpertsOf(rank)));
  }
  const int64_t rows = kChunkBytes / (local_experts * config.hidden_size * DTypeBytes(DType::kF32));
  // Few tokens have room for all (DispatchRoom); of many, about as many again as a uniform choice sends to an expert.
  if (rows <= 16) return rows;
  return std::min(kMost, std::max<int64_t>(rows, rows * config.num_experts / (2 * config.experts_per_token)));
}

EngineInfo DescribeEngine(const EngineOptions& options, const ModelConfig& config, const ExpertPlacement& placement) {
  EngineInfo info;
  const auto dir = std::filesystem::path(options.model_dir).lexically_normal();
  info.model_name = dir.has_filename() ? dir.filename().string() : dir.parent_path().filename().string();
  info.architecture = config.architecture;
  info.num_ranks = info.num_homes = options.num_ranks;
  info.num_layers = static_cast<int>(config.num_layers);
  info.num_experts = static_cast<int>(config.num_experts);
  info.experts_per_token = static_cast<int>(config.experts_per_token);
  info.masked_max_tokens = MaskedMaxTokens(options, config, placement);
  info.kv_bytes_per_token = KvBytesPerToken(config, KvDType(options.kv_dtype));
  info.expert_rank = options.slice_ranks > 0 ? std::vector<int>(config.num_experts, 0) : placement.expert_rank();
  const int64_t q = config.num_heads * config.head_dim, kv = config.num_kv_heads * config.head_dim;
  const int64_t expert =
      config.hidden_size * config.expert_hidden_size * (config.activation == Activation::kSiluGated ? 3 : 2);
  info.row_cost = {
      .linear_flops = 2 * config.num_layers *
                      (config.hidden_size * (2 * q + 2 * kv + config.num_experts) + config.experts_per_token * expert),
      .key_flops = 4 * config.num_layers * q,
      .window = static_cast<int32_t>(config.sliding_window)};
  info.limits = {.vocab_size = static_cast<int32_t>(config.vocab_size),
                 .max_model_len = options.max_model_len > 0 ? options.max_model_len
                                                            : static_cast<int32_t>(config.max_position_embeddings),
                 .num_blocks = 0,
                 .block_size = options.block_size,
                 .max_tokens = options.max_tokens_per_step,
                 .max_sequences = options.max_sequences};
  return info;
}

absl::StatusOr<int32_t> ChooseBlocks(const EngineOptions& options, const EngineInfo& info, int64_t free_bytes) {
  const PlanLimits& limits = info.limits;
  const int64_t per_sequence = (limits.max_model_len + limits.block_size - 1) / limits.block_size;
  const int64_t block_bytes = info.kv_bytes_per_token * limits.block_size;
  if (options.num_blocks > 0) return options.num_blocks;
  const int64_t fit = static_cast<int64_t>(options.memory_fraction * static_cast<double>(free_bytes)) / block_bytes;
  if (fit < 1) {
    return ResourceExhausted("no memory for KV: one block is {} bytes, a rank may take {} of {} free bytes",
                             block_bytes, options.memory_fraction, free_bytes);
  }
  return static_cast<int32_t>(
      std::min<int64_t>({fit, per_sequence * limits.max_sequences, INT32_MAX / limits.block_size}));
}

}  // namespace soloist
