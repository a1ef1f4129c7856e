// One call of PagedAttention with random content, and its float64 reference.
#ifndef SOLOIST_TESTS_GPU_ATTENTION_CASE_H_
#define SOLOIST_TESTS_GPU_ATTENTION_CASE_H_

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "kernels/ops.h"
#include "tests/gpu/gpu_fixture.h"

namespace soloist {

struct AttentionShape {
  int heads, kv_heads, head_dim, block;
  int window = 0;
  DType kv = DType::kBF16;
  float q_scale = 1.5f;  // spread of the queries: how peaked the softmax is
};

// rows <= length; length 0: padding, whose one row is of no interest.
struct SequenceShape {
  int length, rows;
};

// What lies in cache slots that hold no key of any sequence, those of unused blocks and those behind a sequence's end.
enum class Stale { kLarge, kNan };

class AttentionCase {
 public:
  AttentionCase(Gpu& gpu, const AttentionShape& shape, const std::vector<SequenceShape>& sequences, Random& random,
                Stale stale = Stale::kLarge);

  // Into a poisoned output between guard zones. `first` and `count`: those sequences alone.
  std::vector<BFloat16> Run() const { return Run(0, static_cast<int>(sequences_.size())); }
  std::vector<BFloat16> Run(int first, int count) const;
  // Only row `row` of sequence `s`, as a decode of its own.
  std::vector<BFloat16> RunRowAlone(int s, int row) const;
  // All rows finite; `pairs` random (row, head) pairs, or all where there are fewer, against float64.
  void Check(const std::vector<BFloat16>& out, int64_t pairs, Random& random, Errors& errors) const;

  int64_t first_row(int s) const { return starts_[s]; }
  int64_t width() const { return int64_t{shape_.heads} * shape_.head_dim; }
  std::string Name() const;

 private:
  std::vector<BFloat16> RunArgs(AttentionArgs args, int64_t first_row, int64_t rows) const;
  AttentionArgs Args() const;
  void Reference(int s, int row, int head, double* out) const;

  Gpu& gpu_;
  const AttentionShape shape_;
  const std::vector<SequenceShape> sequences_;
  int64_t max_blocks_ = 0;
  int64_t num_blocks_ = 0;
  std::vector<int32_t> starts_, tables_;
  std::vector<BFloat16> q_;
  std::vector<float> keys_, values_;  // the cache, widened
  std::unique_ptr<DeviceArray<BFloat16>> q_device_;
  std::unique_ptr<DeviceArray<uint8_t>> keys_device_, values_device_;
  std::unique_ptr<DeviceArray<int32_t>> tables_device_;
};

}  // namespace soloist

#endif  // SOLOIST_TESTS_GPU_ATTENTION_CASE_H_
