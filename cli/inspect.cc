// soloist inspect: what a model folder holds, and what ranks of a given memory can do with it. Loads nothing.
#include <iostream>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "base/status.h"
#include "cli/flags.h"
#include "engine/model/config.h"
#include "engine/model/footprint.h"
#include "engine/model/weights.h"
#include "nlohmann/json.hpp"

namespace soloist::cli {
namespace {

using Json = nlohmann::json;

struct InspectFlags {
  std::string model_dir;
  std::string load_format = "auto";
  std::vector<int> ranks;
  std::string kv_dtype = "bf16";
  double memory_gb = 0;
  int64_t context = 0;
  bool json = false;
};

double Gb(int64_t bytes) { return static_cast<double>(bytes) * 1e-9; }

// 1, 2, 4, ... up to one expert per rank.
std::vector<int> DefaultRanks(int64_t num_experts) {
  std::vector<int> ranks;
  for (int64_t r = 1; r <= num_experts; r *= 2) {
    if (num_experts % r == 0) ranks.push_back(static_cast<int>(r));
  }
  if (ranks.back() != num_experts) ranks.push_back(static_cast<int>(num_experts));
  return ranks;
}

Json Layout(const ModelConfig& config, const InspectFlags& flags, int ranks, int64_t kv_bytes, int64_t context) {
  const int64_t experts = (config.num_experts + ranks - 1) / ranks;
  const int64_t weights = SharedWeightBytes(config) + ExpertWeightBytes(config, experts);
  Json layout = {{"ranks", ranks}, {"experts_per_rank", experts}, {"weight_bytes_per_rank", weights}};
  if (flags.memory_gb > 0) {
    const auto left = static_cast<int64_t>(flags.memory_gb * 1e9) - weights;
    const int64_t tokens = left > 0 ? left / kv_bytes : 0;
    layout["fits"] = left > 0;
    layout["kv_tokens_per_rank"] = tokens;
    layout["sequences_per_rank"] = tokens / context;
    layout["sequences"] = tokens / context * ranks;
  }
  return layout;
}

void PrintTable(const Json& out) {
  const Json& p = out["parameters"];
  fmt::print("{} ({})\n", out["model"].get<std::string>(), out["architecture"].get<std::string>());
  fmt::print(
      "  {} layers, {} experts (top-{}), hidden {}, expert hidden {}, {} heads ({} KV) x {}, vocabulary {}, context "
      "{}\n",
      out["num_layers"].get<int64_t>(), out["num_experts"].get<int64_t>(), out["experts_per_token"].get<int64_t>(),
      out["hidden_size"].get<int64_t>(), out["expert_hidden_size"].get<int64_t>(), out["num_heads"].get<int64_t>(),
      out["num_kv_heads"].get<int64_t>(), out["head_dim"].get<int64_t>(), out["vocab_size"].get<int64_t>(),
      out["max_model_len"].get<int64_t>());
  fmt::print(
      "  parameters: {:.3f} M, active per token {:.3f} M; attention {:.3f} M, an expert {:.3f} M, embeddings {:.3f} "
      "M\n",
      p["total"].get<double>() * 1e-6, p["active"].get<double>() * 1e-6, p["attention"].get<double>() * 1e-6,
      p["expert"].get<double>() * 1e-6, p["embedding"].get<double>() * 1e-6);
  fmt::print("  KV cache: {} bytes per token ({})\n", out["kv_bytes_per_token"].get<int64_t>(),
             out["kv_dtype"].get<std::string>());
  const bool memory = out.contains("memory_gb");
  fmt::print("\n{:>6} {:>13} {:>16}", "ranks", "experts/rank", "weights/rank GB");
  if (memory) {
    fmt::print("   with {} GB per rank: {:>16} {:>24}", out["memory_gb"].get<double>(), "KV tokens/rank",
               fmt::format("sequences of {}", out["context"].get<int64_t>()));
  }
  fmt::print("\n");
  for (const Json& l : out["layouts"]) {
    fmt::print("{:>6} {:>13} {:>16.3f}", l["ranks"].get<int>(), l["experts_per_rank"].get<int64_t>(),
               Gb(l["weight_bytes_per_rank"].get<int64_t>()));
    if (memory && l["fits"].get<bool>()) {
      fmt::print("   {:>{}} {:>24}", l["kv_tokens_per_rank"].get<int64_t>(),
                 fmt::formatted_size("with {} GB per rank: ", out["memory_gb"].get<double>()) + 16,
                 l["sequences"].get<int64_t>());
    } else if (memory) {
      fmt::print("   does not fit");
    }
    fmt::print("\n");
  }
}

absl::Status Inspect(const InspectFlags& flags) {
  ASSIGN_OR_RETURN(const ModelConfig config, LoadModelConfig(flags.model_dir));
  // Finds and checks every tensor.
  if (flags.load_format == "auto") RETURN_IF_ERROR(OpenCheckpointSource(config, flags.model_dir).status());
  const Parameters parameters = CountParameters(config);
  const int64_t kv_bytes = KvBytesPerToken(config, flags.kv_dtype == "f32" ? DType::kF32 : DType::kBF16);
  const int64_t context = flags.context > 0 ? flags.context : config.max_position_embeddings;
  Json out = {{"model", flags.model_dir},
              {"architecture", config.architecture},
              {"num_layers", config.num_layers},
              {"hidden_size", config.hidden_size},
              {"num_heads", config.num_heads},
              {"num_kv_heads", config.num_kv_heads},
              {"head_dim", config.head_dim},
              {"num_experts", config.num_experts},
              {"experts_per_token", config.experts_per_token},
              {"expert_hidden_size", config.expert_hidden_size},
              {"vocab_size", config.vocab_size},
              {"max_model_len", config.max_position_embeddings},
              {"parameters",
               {{"total", parameters.total},
                {"active", parameters.active},
                {"attention", parameters.attention},
                {"expert", parameters.expert},
                {"embedding", parameters.embedding}}},
              {"kv_dtype", flags.kv_dtype},
              {"kv_bytes_per_token", kv_bytes},
              {"layouts", Json::array()}};
  if (flags.memory_gb > 0) {
    out["memory_gb"] = flags.memory_gb;
    out["context"] = context;
  }
  for (const int ranks : flags.ranks.empty() ? DefaultRanks(config.num_experts) : flags.ranks) {
    if (ranks < 1 || ranks > config.num_experts) {
      return InvalidArgument("--ranks is {}, allowed: 1 to {} (the number of experts)", ranks, config.num_experts);
    }
    out["layouts"].push_back(Layout(config, flags, ranks, kv_bytes, context));
  }
  if (flags.json) {
    std::cout << out.dump(2) << "\n";
  } else {
    PrintTable(out);
  }
  return absl::OkStatus();
}

}  // namespace

void AddInspect(CLI::App& app, int& exit_code) {
  auto flags = std::make_shared<InspectFlags>();
  CLI::App* sub = app.add_subcommand("inspect", "a model folder: parameters, bytes per rank, what fits; loads nothing");
  sub->add_option("--model", flags->model_dir, "Hugging Face model folder")->required();
  sub->add_option("--load-format", flags->load_format, "auto: check the safetensors too; dummy: config.json only")
      ->check(CLI::IsMember({"auto", "dummy"}))
      ->capture_default_str();
  sub->add_option("--ranks", flags->ranks, "layouts to show: 1,4,16; default: powers of two up to one expert per rank")
      ->delimiter(',');
  sub->add_option("--kv-dtype", flags->kv_dtype, "keys and values in the cache")
      ->check(CLI::IsMember({"f32", "bf16"}))
      ->capture_default_str();
  sub->add_option("--memory", flags->memory_gb, "GB (1e9 bytes) of each rank for weights and KV: show what fits")
      ->check(CLI::PositiveNumber);
  sub->add_option("--context", flags->context, "with --memory: tokens of a sequence; default: the model's limit")
      ->check(CLI::PositiveNumber);
  sub->add_flag("--json", flags->json, "one JSON object");
  sub->callback([flags, &exit_code] { exit_code = Report(Inspect(*flags)); });
}

}  // namespace soloist::cli
