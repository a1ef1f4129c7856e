// Bytes from anywhere as the body of a completion, a chat or a tokenization: what the readers let pass, the front end's
// validation can look at, and what it lets pass the scheduler accepts.
#include <cstdint>
#include <string>
#include <string_view>
#include <utility>
#include <variant>
#include <vector>

#include "base/check.h"
#include "scheduler/scheduler.h"
#include "server/generation.h"
#include "server/http/api_error.h"
#include "server/http/json_text.h"
#include "server/http/openai_request.h"

namespace soloist {
namespace {

void CheckRefusal(const absl::Status& status) {
  const ApiError error = ToApiError(status);
  CHECK(error.status == 400 || error.status == 404);
  const nlohmann::json body = nlohmann::json::parse(ErrorJson(error));
  CHECK(body["error"]["message"].is_string() && body["error"]["type"].is_string());
}

struct NoSink final : TokenSink {
  bool OnToken(TokenEvent) override { return true; }
  void OnFinish(const FinishEvent&) override {}
};

void CheckPrompts(const OpenAiRequest& read) {
  const PlanLimits limits = {
      .vocab_size = 64, .max_model_len = 128, .num_blocks = 16, .block_size = 4, .max_tokens = 32, .max_sequences = 8};
  CHECK(!read.prompts.empty());
  for (const GenerationRequest& request : read.prompts) {
    if (!Validate(request, {}, limits).ok()) continue;
    CHECK(read.n == request.n.value_or(1));
    std::vector<int32_t> prompt;
    if (const auto* ids = std::get_if<std::vector<int32_t>>(&request.prompt)) {
      prompt = *ids;
    } else {
      for (const char c : std::get<std::string>(request.prompt)) prompt.push_back(c & 63);
    }
    auto built = BuildRequest(request, std::move(prompt), {}, limits);
    if (!built.ok()) continue;
    built->id = request.request_id.value_or(DrawRequestId());
    built->sink = std::make_shared<NoSink>();
    CHECK_OK(soloist::CheckRequest(*built, limits));
  }
}

}  // namespace
}  // namespace soloist

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using soloist::ChatInput;
  const auto body = soloist::ParseJson({reinterpret_cast<const char*>(data), size});
  if (!body.ok()) {
    soloist::CheckRefusal(body.status());
    return 0;
  }
  const soloist::OpenAiContext context = {.model = "tiny",
                                          .render = [](const ChatInput& input) -> absl::StatusOr<std::vector<int32_t>> {
                                            return std::vector<int32_t>(input.messages.size() % 16 + 1, 5);
                                          },
                                          .max_prompts = 8};
  for (const auto& read : {soloist::ReadCompletion(*body, context), soloist::ReadChat(*body, context)}) {
    if (read.ok()) {
      soloist::CheckPrompts(*read);
    } else {
      soloist::CheckRefusal(read.status());
    }
  }
  if (const auto chat = soloist::ReadChatInput(*body); !chat.ok()) soloist::CheckRefusal(chat.status());
  return 0;
}
