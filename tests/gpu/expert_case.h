// One call of ExpertMlp with random content, and its float64 reference.
#ifndef SOLOIST_TESTS_GPU_EXPERT_CASE_H_
#define SOLOIST_TESTS_GPU_EXPERT_CASE_H_

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "kernels/ops.h"
#include "tests/gpu/gpu_fixture.h"

namespace soloist {

// The weights of some experts, on both sides.
struct ExpertSet {
  ExpertSet(Gpu& gpu, const ModelSizes& sizes, Random& random);
  int64_t hidden, inner;
  bool gated;
  std::vector<std::vector<BFloat16>> w_in, w_out;
  std::vector<DeviceArray<BFloat16>> w_in_device, w_out_device;
  std::vector<Tensor> w_in_tensors, w_out_tensors;

  int64_t in_rows() const { return gated ? 2 * inner : inner; }
  int num_experts() const { return static_cast<int>(w_in.size()); }
};

// Rows of one expert from one source.
struct SourceRows {
  int count, capacity;
};

// kApart: rows lie source after source, in each expert after expert, `capacity` rows each with gaps between, so one
// expert's groups are far apart; rows beyond a count are NaN. kPacked: one source, expert after expert without gaps,
// and the call says so (ExpertMlpArgs::row_offsets).
class ExpertCase {
 public:
  enum class Layout { kApart, kPacked };
  // rows[expert][source].
  ExpertCase(Gpu& gpu, const ExpertSet& experts, const std::vector<std::vector<SourceRows>>& rows, Random& random,
             std::string name, Layout layout = Layout::kApart);

  enum class Begin { kOnHost, kOnDevice };
  // Into a poisoned output between guard zones.
  std::vector<BFloat16> Run(int64_t expected_rows, Begin begin) const;
  // Rows of no group untouched, the others finite; `rows` of them in `columns` columns against float64.
  void Check(const std::vector<BFloat16>& out, int64_t rows, int64_t columns, Random& random, Errors& errors,
             const std::string& what) const;
  // Row r of x through its expert, alone in the call.
  std::vector<BFloat16> RunRowAlone(int64_t row) const;

  int64_t total_rows() const { return std::ssize(live_); }
  const std::vector<int64_t>& live() const { return live_; }
  int64_t hidden() const { return experts_.hidden; }
  const std::string& name() const { return name_; }

 private:
  std::vector<BFloat16> RunGroups(const Tensor& x, const std::vector<ExpertRows>& groups, int64_t expected_rows,
                                  const int32_t* row_offsets) const;

  Gpu& gpu_;
  const ExpertSet& experts_;
  const std::string name_;
  std::vector<ExpertRows> groups_;   // by expert, then source; begins on the host
  std::vector<int64_t> live_;        // rows that belong to a group
  std::vector<int32_t> row_expert_;  // [rows of x]; -1: none
  std::vector<BFloat16> x_;
  std::unique_ptr<DeviceArray<BFloat16>> x_device_;
  std::unique_ptr<DeviceArray<int32_t>> counts_, begins_, offsets_;
};

}  // namespace soloist

#endif  // SOLOIST_TESTS_GPU_EXPERT_CASE_H_
