#include "tests/gpu/expert_case.h"

#include <algorithm>
#include <cmath>
#include <utility>

namespace soloist {

ExpertSet::ExpertSet(Gpu& gpu, const ModelSizes& sizes, Random& random)
    : hidden(sizes.hidden), inner(sizes.inner), gated(sizes.gated) {
  for (int e = 0; e < sizes.experts; ++e) {
    w_in.push_back(random.NormalBf16(in_rows() * hidden, 1.5f / std::sqrt(static_cast<float>(hidden))));
    w_out.push_back(random.NormalBf16(hidden * inner, 1 / std::sqrt(static_cast<float>(inner))));
    w_in_device.emplace_back(gpu, w_in.back());
    w_out_device.emplace_back(gpu, w_out.back());
    w_in_tensors.push_back(w_in_device.back().View(in_rows(), hidden));
    w_out_tensors.push_back(w_out_device.back().View(hidden, inner));
  }
}

ExpertCase::ExpertCase(Gpu& gpu, const ExpertSet& experts, const std::vector<std::vector<SourceRows>>& rows,
                       Random& random, std::string name, Layout layout)
    : gpu_(gpu), experts_(experts), name_(std::move(name)) {
  EXPECT_EQ(std::ssize(rows), experts.num_experts()) << name_;
  std::vector<std::vector<int64_t>> begin(rows.size(), std::vector<int64_t>(rows[0].size()));
  int64_t at = 0;
  for (size_t s = 0; s < rows[0].size(); ++s) {
    if (layout == Layout::kApart) ++at;  // a gap, as a header is
    for (size_t e = 0; e < rows.size(); ++e) {
      begin[e][s] = at;
      at += layout == Layout::kApart ? rows[e][s].capacity : rows[e][s].count;
    }
  }
  row_expert_.assign(at, -1);
  std::vector<int32_t> counts, begins;
  for (size_t e = 0; e < rows.size(); ++e) {
    for (size_t s = 0; s < rows[e].size(); ++s) {
      counts.push_back(rows[e][s].count);
      begins.push_back(static_cast<int32_t>(begin[e][s]));
      for (int64_t i = 0; i < rows[e][s].count; ++i) {
        live_.push_back(begin[e][s] + i);
        row_expert_[begin[e][s] + i] = static_cast<int32_t>(e);
      }
    }
  }
  counts_ = std::make_unique<DeviceArray<int32_t>>(gpu, counts);
  begins_ = std::make_unique<DeviceArray<int32_t>>(gpu, begins);
  for (size_t e = 0, i = 0; e < rows.size(); ++e) {
    for (size_t s = 0; s < rows[e].size(); ++s, ++i) {
      groups_.push_back({static_cast<int32_t>(e), begins[i], rows[e][s].capacity, counts_->data() + i});
    }
  }
  if (layout == Layout::kPacked) {
    EXPECT_EQ(rows[0].size(), 1u) << name_;
    std::vector<int32_t> offsets = begins;
    offsets.push_back(static_cast<int32_t>(at));
    offsets_ = std::make_unique<DeviceArray<int32_t>>(gpu, offsets);
  }
  x_ = random.NormalBf16(at * hidden());
  for (int64_t r = 0; r < at; ++r) {
    if (row_expert_[r] < 0) std::memset(static_cast<void*>(&x_[r * hidden()]), 0xFF, hidden() * 2);
  }
  x_device_ = std::make_unique<DeviceArray<BFloat16>>(gpu, x_);
}

std::vector<BFloat16> ExpertCase::RunGroups(const Tensor& x, const std::vector<ExpertRows>& groups,
                                            int64_t expected_rows, const int32_t* row_offsets) const {
  const auto scratch = DeviceArray<BFloat16>::Poisoned(gpu_, x.rows * experts_.in_rows());
  const auto out = DeviceArray<BFloat16>::Poisoned(gpu_, x.rows * hidden());
  gpu_.ops().ExpertMlp({.x = x,
                        .groups = groups.data(),
                        .num_groups = static_cast<int>(groups.size()),
                        .w_in = experts_.w_in_tensors.data(),
                        .w_out = experts_.w_out_tensors.data(),
                        .num_experts = experts_.num_experts(),
                        .activation = experts_.gated ? Activation::kSiluGated : Activation::kGelu,
                        .row_offsets = row_offsets,
                        .expected_rows = expected_rows,
                        .scratch = scratch.View(x.rows, experts_.in_rows()),
                        .out = out.View(x.rows, hidden())},
                       gpu_.stream());
  scratch.Read(name_ + " scratch");
  return out.Read(name_);
}

std::vector<BFloat16> ExpertCase::Run(int64_t expected_rows, Begin begin) const {
  std::vector<ExpertRows> groups = groups_;
  if (begin == Begin::kOnDevice) {
    for (size_t i = 0; i < groups.size(); ++i) {
      groups[i].row_begin = 0;
      groups[i].row_begin_on_device = begins_->data() + i;
    }
  }
  return RunGroups(x_device_->View(std::ssize(row_expert_), hidden()), groups, expected_rows,
                   offsets_ != nullptr ? offsets_->data() : nullptr);
}

std::vector<BFloat16> ExpertCase::RunRowAlone(int64_t row) const {
  const DeviceArray<int32_t> one(gpu_, {1});
  const ExpertRows group = {row_expert_[row], 0, 1, one.data()};
  return RunGroups(x_device_->View(std::ssize(row_expert_), hidden()).Rows(row, 1), {group}, 1, nullptr);
}

void ExpertCase::Check(const std::vector<BFloat16>& out, int64_t rows, int64_t columns, Random& random, Errors& errors,
                       const std::string& what) const {
  const int64_t width = hidden(), inner = experts_.inner;
  int64_t touched = 0, not_finite = 0;
  for (int64_t r = 0; r < std::ssize(row_expert_); ++r) {
    for (int64_t d = 0; d < width; ++d) {
      const BFloat16 value = out[r * width + d];
      touched += row_expert_[r] < 0 && !IsPoison(value);
      not_finite += row_expert_[r] >= 0 && !std::isfinite(Widened(value));
    }
  }
  EXPECT_EQ(touched, 0) << name_ << " " << what << ": elements written in rows of no group";
  EXPECT_EQ(not_finite, 0) << name_ << " " << what << ": elements not finite in rows of groups";

  std::vector<int64_t> chosen_rows = live_, chosen_columns;
  if (total_rows() > rows) {
    chosen_rows = {live_.front(), live_.back()};
    while (std::ssize(chosen_rows) < rows) chosen_rows.push_back(live_[random.Int(0, total_rows() - 1)]);
  }
  for (int64_t j = 0; j < std::min(columns, width); ++j) {
    chosen_columns.push_back(columns >= width ? j : j == 0 ? 0 : j == 1 ? width - 1 : random.Int(0, width - 1));
  }
  const auto count = std::ssize(chosen_rows), num_columns = std::ssize(chosen_columns);
  std::vector<double> middle(count * inner), ref(count * num_columns);
  const auto dot = [&](const auto* a, const BFloat16* w, int64_t n) {
    double sum = 0;
    for (int64_t i = 0; i < n; ++i) sum += static_cast<double>(a[i]) * Widened(w[i]);
    return sum;
  };
  constexpr int64_t kParts = 16;
  Parallel(count * kParts, [&](int64_t task) {
    const int64_t r = task / kParts, part = task % kParts;
    const int64_t row = chosen_rows[r], e = row_expert_[row];
    std::vector<float> x(width);
    for (int64_t d = 0; d < width; ++d) x[d] = Widened(x_[row * width + d]);
    for (int64_t i = part * inner / kParts; i < (part + 1) * inner / kParts; ++i) {
      const double gate = dot(x.data(), &experts_.w_in[e][i * width], width);
      if (experts_.gated) {
        const double up = dot(x.data(), &experts_.w_in[e][(inner + i) * width], width);
        middle[r * inner + i] = gate / (1 + std::exp(-gate)) * up;
      } else {
        middle[r * inner + i] = 0.5 * gate * (1 + std::erf(gate / std::sqrt(2.0)));
      }
    }
  });
  Parallel(count, [&](int64_t r) {
    for (int64_t j = 0; j < num_columns; ++j) {
      const int64_t e = row_expert_[chosen_rows[r]];
      ref[r * num_columns + j] = dot(&middle[r * inner], &experts_.w_out[e][chosen_columns[j] * inner], inner);
    }
  });
  std::vector<BFloat16> values(num_columns);
  for (int64_t r = 0; r < count; ++r) {
    for (int64_t j = 0; j < num_columns; ++j) values[j] = out[chosen_rows[r] * width + chosen_columns[j]];
    errors.Row(values.data(), &ref[r * num_columns], num_columns,
               name_ + " " + what +
                   Text(" row %d of expert %d", static_cast<int>(chosen_rows[r]), row_expert_[chosen_rows[r]]));
  }
}

}  // namespace soloist
