// Bytes from anywhere as a HomePlan: Parse, Validate, and what must hold of a plan that both let pass.
#include <cstdint>
#include <cstring>
#include <utility>
#include <vector>

#include "base/check.h"
#include "engine/simulated_engine.h"
#include "engine/step.h"
#include "engine/worker/staged_plan.h"

namespace {

using soloist::HomePlan;

void CheckSections(const HomePlan& plan) {
  CHECK_EQ(plan.token_ids().size(), static_cast<size_t>(plan.num_tokens()));
  CHECK_EQ(plan.positions().size(), static_cast<size_t>(plan.num_tokens()));
  CHECK_EQ(plan.slot_mapping().size(), static_cast<size_t>(plan.num_tokens()));
  CHECK_EQ(plan.query_starts().size(), static_cast<size_t>(plan.num_sequences()) + 1);
  CHECK_EQ(plan.seq_lens().size(), static_cast<size_t>(plan.num_sequences()));
  CHECK_EQ(plan.block_tables().size(), static_cast<size_t>(plan.num_sequences()) * plan.max_blocks());
  CHECK_EQ(plan.logit_rows().size(), static_cast<size_t>(plan.num_logit_rows()));
  CHECK_EQ(plan.sampling().size(), static_cast<size_t>(plan.num_logit_rows()));
  CHECK_EQ(plan.bias().size(), static_cast<size_t>(plan.num_bias()));
  CHECK_EQ(plan.history().size(), static_cast<size_t>(plan.num_history()));
  CHECK_EQ(plan.mask_rows().size(), static_cast<size_t>(plan.num_masks()));
  CHECK_EQ(plan.masks().size(), static_cast<size_t>(plan.num_masks()) * plan.mask_words());
  CHECK_EQ(plan.targets().size(), static_cast<size_t>(plan.num_targets()));
  CHECK_EQ(plan.Offset(13), static_cast<int64_t>(plan.words().size()));
}

// Its micro-batches have all rows, each once.
void CheckMicroBatches(const HomePlan& plan) {
  soloist::StagedPlan staged = soloist::StagedPlan::Layout(soloist::RoomOf(plan));
  std::vector<int32_t> words(staged.words);
  soloist::Stage(plan, staged, words.data());
  CHECK_EQ(staged.num_batches, plan.is_split() ? 2 : 1);
  CHECK_EQ(staged.batches[0].tokens + staged.batches[1].tokens, plan.num_tokens());
  for (const soloist::StagedBatch& batch : staged.batches) {
    CHECK_EQ(words[batch.query_starts], 0);
    CHECK_EQ(words[batch.query_starts + batch.sequences], batch.tokens);
    for (int64_t s = 0; s < batch.sequences; ++s) {
      const int32_t rows = words[batch.query_starts + s + 1] - words[batch.query_starts + s];
      CHECK(rows >= 1 && rows <= batch.max_query_rows);
      CHECK(words[batch.seq_lens + s] >= rows && words[batch.seq_lens + s] <= batch.max_seq_len);
    }
  }
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  soloist::SimulatedOptions options;
  options.limits = {
      .vocab_size = 64, .max_model_len = 64, .num_blocks = 16, .block_size = 4, .max_tokens = 32, .max_sequences = 8};
  std::vector<int32_t> words(size / 4);
  if (!words.empty()) std::memcpy(words.data(), data, words.size() * 4);
  absl::StatusOr<HomePlan> plan = HomePlan::Parse(std::move(words));
  if (!plan.ok()) return 0;
  CheckSections(*plan);
  if (!plan->Validate(options.limits).ok()) return 0;
  CHECK_OK(HomePlan::Parse({plan->words().begin(), plan->words().end()}).status());

  CheckMicroBatches(*plan);

  const int32_t rows = plan->num_logit_rows();
  soloist::SimulatedEngine engine(options);
  soloist::StepPlan step;
  step.step = plan->step();
  step.homes.push_back(*std::move(plan));
  if (!engine.Submit(std::move(step)).ok()) return 0;
  const absl::StatusOr<soloist::StepResult> result = engine.Await();
  CHECK_OK(result.status());
  CHECK_EQ(result->homes[0].tokens.size(), static_cast<size_t>(rows));
  for (const int32_t token : result->homes[0].tokens) CHECK(token >= 0 && token < options.limits.vocab_size);
  return 0;
}
