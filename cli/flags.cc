#include "cli/flags.h"

#include <filesystem>
#include <utility>

#include "base/clock.h"
#include "base/status.h"
#include "engine/model/config.h"
#include "spdlog/spdlog.h"

namespace soloist::cli {
void EngineFlags::AddTo(CLI::App& app) {
  app.add_option("--model", engine.model_dir, "Hugging Face model folder")->required();
  app.add_option("--ranks", engine.num_ranks, "expert-parallel ranks, 1 to the number of experts")
      ->capture_default_str();
  app.add_option("--device", engine.device.kind, "cpu, or cuda in a binary built with it")->capture_default_str();
  app.add_option("--threads", engine.device.cpu_threads, "CPU threads for all ranks together; 0: one per core")
      ->capture_default_str();
  AddCpuGemm(app, engine.device.cpu_gemm,
             "how a CPU multiplies by weights: amx and fma to float32's precision, avx512_bf16 to 18 bits of the "
             "activations; auto: amx where it has it, else avx512_bf16 on AMD's, else fma");
  app.add_flag("--deterministic", engine.device.deterministic,
               "CUDA: a request's tokens never depend on what else is in the batch; slower (the CPU always does so)");
  app.add_option("--tuning-file", engine.device.tuning_file,
                 "CUDA: keeps the matrix algorithms that a search has found for this device; empty: searched anew");
  app.add_option("--load-format", engine.load_format, "auto: safetensors; dummy: random weights, config.json only")
      ->check(CLI::IsMember({"auto", "dummy"}))
      ->capture_default_str();
  app.add_option("--dummy-seed", engine.dummy_seed, "seed of --load-format=dummy")->capture_default_str();
  app.add_option("--max-model-len", engine.max_model_len, "longest prompt + output, tokens; 0: the model's limit")
      ->capture_default_str();
  app.add_option("--block-size", engine.block_size, "tokens per KV block; 0: 16, on CUDA 64")->capture_default_str();
  app.add_option("--num-blocks", engine.num_blocks, "KV blocks per rank; 0: from --memory-fraction")
      ->capture_default_str();
  app.add_option("--memory-fraction", engine.memory_fraction,
                 "share of the free memory for KV, all ranks together; 0: 0.5, on CUDA 0.9")
      ->capture_default_str();
  app.add_option("--kv-dtype", engine.kv_dtype, "keys and values in the cache; auto: f32, on CUDA bf16")
      ->check(CLI::IsMember({"auto", "f32", "bf16", "fp8_e4m3"}))
      ->capture_default_str();
  app.add_option("--max-tokens-per-step", engine.max_tokens_per_step,
                 "token budget of a rank's step (decodes first); 0: 512, on CUDA 8192")
      ->capture_default_str();
  app.add_option("--max-sequences", engine.max_sequences, "sequences that run at once on a rank")
      ->capture_default_str();
  app.add_option("--max-queue", scheduler.max_queue, "requests that may wait; more are refused")->capture_default_str();
  app.add_option("--masked-max-tokens", engine.masked_max_tokens,
                 "dispatch with fixed capacity while no rank has more tokens in a step; above: exact counts; -1: 64, "
                 "on CPUs less where rows are long")
      ->capture_default_str();
  app.add_option("--micro-batches", micro_batches,
                 "2: every step with two rows on a rank runs in two halves, one of which computes while the other's "
                 "rows travel (decode steps read their experts twice); auto: where it is known to gain")
      ->check(CLI::IsMember({"auto", "1", "2"}))
      ->capture_default_str();
  app.add_option("--trace", engine.trace_file,
                 "writes what each rank does to this file, for Chrome's tracing page or Perfetto; workers that this "
                 "process starts write FILE.rankR");
  app.add_option("--profile-every", engine.profile_every,
                 "every so many steps one is run without a graph and timed group by group; 0: none")
      ->check(CLI::NonNegativeNumber)
      ->capture_default_str();
  app.add_option("--collective-timeout", collective_timeout_s, "seconds until a stuck collective is an error")
      ->capture_default_str();
  cluster.AddTo(app);
  app.add_flag("--no-prefix-cache", no_prefix_cache, "compute every prompt from its start");
}

absl::StatusOr<ModelDescription> DescribeModel(const EngineFlags& flags) {
  ASSIGN_OR_RETURN(const ModelConfig config, LoadModelConfig(flags.engine.model_dir));
  ASSIGN_OR_RETURN(const GenerationDefaults defaults, LoadGenerationDefaults(flags.engine.model_dir));
  const std::filesystem::path dir = std::filesystem::path(flags.engine.model_dir).lexically_normal();
  return ModelDescription{
      .name = dir.has_filename() ? dir.filename().string() : dir.parent_path().filename().string(),
      .architecture = config.architecture,
      .eos_token_ids = defaults.eos_token_ids.empty() ? config.eos_token_ids : defaults.eos_token_ids,
      .defaults = {.temperature = defaults.temperature,
                   .top_p = defaults.top_p,
                   .min_p = defaults.min_p,
                   .top_k = defaults.top_k,
                   .repetition_penalty = defaults.repetition_penalty}};
}

absl::StatusOr<Runtime> StartRuntime(EngineFlags flags) {
  ASSIGN_OR_RETURN(ModelDescription model, DescribeModel(flags));
  flags.scheduler.prefix_cache = !flags.no_prefix_cache;
  ASSIGN_OR_RETURN(flags.scheduler.micro_batches, ParseMicroBatches(flags.micro_batches));
  flags.scheduler.eos_token_ids = std::move(model.eos_token_ids);
  flags.engine.collective_timeout = absl::Seconds(flags.collective_timeout_s);
  Runtime runtime;
  ASSIGN_OR_RETURN(StartedEngine started, StartEngine(flags.engine, flags.cluster));
  runtime.workers = std::move(started.workers);
  runtime.engine = std::move(started.engine);
  const EngineInfo& info = runtime.engine->Info();
  spdlog::info("{} ({}) on {}: {} ranks, {} experts, {:.1f} MB of weights per rank, {} KV blocks of {} tokens per rank",
               info.model_name, info.architecture, info.device, info.num_ranks, info.num_experts,
               static_cast<double>(info.weight_bytes_per_rank) * 1e-6, info.limits.num_blocks, info.limits.block_size);
  flags.scheduler.max_tokens_per_step = info.limits.max_tokens;
  flags.scheduler.max_sequences = info.limits.max_sequences;
  ASSIGN_OR_RETURN(runtime.loop, StepLoop::Create(flags.scheduler, *runtime.engine, Clock::Real()));
  return runtime;
}

void AddCpuGemm(CLI::App& app, std::string& kernel, const std::string& help) {
  app.add_option("--cpu-gemm", kernel, help)
      ->check(CLI::IsMember({"auto", "amx", "avx512_bf16", "fma"}))
      ->capture_default_str();
}

void AddCheckFlags(CLI::App& app, bool& check) {
  app.add_flag("--check-flags", check, "end at once, with status 0 if the flags are good");
}

int Report(const absl::Status& status) {
  if (status.ok()) return 0;
  fmt::print(stderr, "soloist: {}\n", status.message());
  return 1;
}

}  // namespace soloist::cli
