// Bytes from anywhere as a soloist.v1.GenerateRequest: what the server's validation lets pass, the scheduler accepts.
#include <cstdint>
#include <string>
#include <utility>
#include <variant>
#include <vector>

#include "base/check.h"
#include "proto/soloist/v1/inference.pb.h"
#include "scheduler/scheduler.h"
#include "server/generation.h"
#include "server/grpc_convert.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  soloist::v1::GenerateRequest message;
  if (!message.ParseFromArray(data, static_cast<int>(size))) return 0;
  const soloist::PlanLimits limits = {
      .vocab_size = 64, .max_model_len = 128, .num_blocks = 16, .block_size = 4, .max_tokens = 32, .max_sequences = 8};
  const soloist::GenerationRequest request = soloist::FromProto(message);
  if (!soloist::Validate(request, {.allow_logits = true}, limits).ok()) return 0;
  std::vector<int32_t> prompt;
  if (const auto* ids = std::get_if<std::vector<int32_t>>(&request.prompt)) {
    prompt = *ids;
  } else {
    for (const char c : std::get<std::string>(request.prompt)) prompt.push_back(c & 63);
  }
  auto built = soloist::BuildRequest(request, std::move(prompt), {}, limits);
  if (!built.ok()) return 0;
  built->id = request.request_id.value_or(soloist::DrawRequestId());
  struct NoSink final : soloist::TokenSink {
    bool OnToken(soloist::TokenEvent) override { return true; }
    void OnFinish(const soloist::FinishEvent&) override {}
  };
  built->sink = std::make_shared<NoSink>();
  CHECK_OK(soloist::CheckRequest(*built, limits));
  return 0;
}
