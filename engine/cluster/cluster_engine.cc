#include "engine/cluster/cluster_engine.h"

#include <utility>

#include "base/status.h"
#include "engine/cluster/fingerprint.h"
#include "engine/cluster/leader.h"
#include "engine/model/config.h"
#include "engine/model/footprint.h"

namespace soloist {
namespace {

absl::Status CheckClusterOptions(const ClusterOptions& options) {
  if (options.spares < 0) return InvalidArgument("spares is {}, allowed: >= 0", options.spares);
  const std::string& transport = options.require_transport;
  if (transport != "any" && transport != "ib" && transport != "nvlink") {
    return InvalidArgument("require_transport is '{}', allowed: any, ib, nvlink", transport);
  }
  if (options.engine.slice_ranks > 0) return InvalidArgument("a slice is one rank of this process, not a cluster");
  const auto positive = [](const char* name, absl::Duration value) {
    return value > absl::ZeroDuration() ? absl::OkStatus()
                                        : InvalidArgument("{} is {}, allowed: > 0", name, absl::FormatDuration(value));
  };
  RETURN_IF_ERROR(positive("start_timeout", options.start_timeout));
  RETURN_IF_ERROR(positive("silence_timeout", options.silence_timeout));
  RETURN_IF_ERROR(positive("step_timeout", options.step_timeout));
  RETURN_IF_ERROR(positive("replace_timeout", options.replace_timeout));
  return positive("abort_timeout", options.abort_timeout);
}

}  // namespace

absl::StatusOr<std::unique_ptr<ClusterEngine>> CreateClusterEngine(const ClusterOptions& given, const Clock& clock,
                                                                   const ClusterProgress& on_progress) {
  ClusterOptions options = given;
  options.engine = WithDefaults(options.engine);
  const EngineOptions& engine = options.engine;
  RETURN_IF_ERROR(CheckClusterOptions(options));
  ASSIGN_OR_RETURN(const ModelConfig config, LoadModelConfig(engine.model_dir));
  RETURN_IF_ERROR(CheckEngineOptions(engine, config));
  ASSIGN_OR_RETURN(const ExpertPlacement placement, PlaceExperts(engine, config, engine.num_ranks));
  Leader::Expectations expectations{.expert_bytes = ExpertWeightBytes(config, 1)};
  ASSIGN_OR_RETURN(expectations.build_id, ExecutableFingerprint());
  ASSIGN_OR_RETURN(expectations.config_hash, ConfigFingerprint(engine.model_dir));
  if (engine.load_format != "dummy") {
    // A leader without the weights takes the first worker's word.
    auto checkpoint = CheckpointFingerprint(engine.model_dir);
    if (checkpoint.ok()) expectations.checkpoint_hash = *std::move(checkpoint);
  }
  auto leader = std::make_unique<Leader>(options, DescribeEngine(engine, config, placement), expectations, clock);
  RETURN_IF_ERROR(leader->Listen());
  if (options.on_listening) RETURN_IF_ERROR(options.on_listening(leader->address()));
  RETURN_IF_ERROR(leader->AwaitReady(on_progress));
  return leader;
}

}  // namespace soloist
