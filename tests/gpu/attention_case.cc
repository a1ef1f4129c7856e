#include "tests/gpu/attention_case.h"

#include <algorithm>
#include <cmath>
#include <utility>

namespace soloist {
namespace {

// Random cache content in its own format, and what it means.
std::vector<uint8_t> FillCache(int64_t size, DType dtype, Random& random, const std::vector<bool>& used_slot,
                               const std::function<int64_t(int64_t)>& slot_of, Stale stale, std::vector<float>* wide) {
  *wide = random.Normal(size);
  std::vector<uint8_t> bytes(size * DTypeBytes(dtype));
  for (int64_t i = 0; i < size; ++i) {
    float& value = (*wide)[i];
    if (!used_slot[slot_of(i)]) {
      const float large = i % 2 == 0 ? 3e4f : -3e4f;
      value = stale == Stale::kNan ? std::numeric_limits<float>::quiet_NaN() : large;
    }
    if (dtype == DType::kBF16) {
      const BFloat16 narrow = Rounded(value);
      value = Widened(narrow);
      std::memcpy(&bytes[i * 2], &narrow, 2);
    } else {
      bytes[i] = ToF8(value);
      value = FromF8(bytes[i]);
    }
  }
  return bytes;
}

}  // namespace

AttentionCase::AttentionCase(Gpu& gpu, const AttentionShape& shape, const std::vector<SequenceShape>& sequences,
                             Random& random, Stale stale)
    : gpu_(gpu), shape_(shape), sequences_(sequences) {
  starts_.push_back(0);
  int64_t used = 0;
  for (const SequenceShape& s : sequences_) {
    EXPECT_TRUE(s.length == 0 ? s.rows == 1 : s.rows <= s.length);
    const int64_t blocks = (s.length + shape.block - 1) / shape.block;
    max_blocks_ = std::max(max_blocks_, blocks);
    used += blocks;
    starts_.push_back(starts_.back() + s.rows);
  }
  max_blocks_ += random.Int(0, 3);  // tables may be wider than needed
  num_blocks_ = used + 3;
  const auto ids = random.Permutation(static_cast<int32_t>(num_blocks_));
  tables_.assign(sequences_.size() * max_blocks_, 0);
  std::vector<bool> used_slot(num_blocks_ * shape.block, false);
  int64_t next = 0;
  for (size_t s = 0; s < sequences_.size(); ++s) {
    for (int p = 0; p < sequences_[s].length; ++p) {
      int32_t& id = tables_[s * max_blocks_ + p / shape.block];
      if (p % shape.block == 0) id = ids[next++];
      used_slot[int64_t{id} * shape.block + p % shape.block] = true;
    }
  }
  const int64_t block_elements = int64_t{shape.kv_heads} * shape.block * shape.head_dim;
  const auto slot_of = [&](int64_t i) { return i / block_elements * shape.block + i / shape.head_dim % shape.block; };
  const int64_t size = num_blocks_ * block_elements;
  keys_device_ =
      std::make_unique<DeviceArray<uint8_t>>(gpu, FillCache(size, shape.kv, random, used_slot, slot_of, stale, &keys_));
  values_device_ = std::make_unique<DeviceArray<uint8_t>>(
      gpu, FillCache(size, shape.kv, random, used_slot, slot_of, stale, &values_));
  q_ = random.NormalBf16(starts_.back() * width(), shape.q_scale);
  q_device_ = std::make_unique<DeviceArray<BFloat16>>(gpu, q_);
  tables_device_ = std::make_unique<DeviceArray<int32_t>>(gpu, tables_);
}

std::string AttentionCase::Name() const {
  int longest = 0, most_rows = 0;
  for (const SequenceShape& s : sequences_)
    longest = std::max(longest, s.length), most_rows = std::max(most_rows, s.rows);
  return Text("heads=%d/%d dim=%d block=%d window=%d %s sequences=%d longest=%d rows<=%d", shape_.heads,
              shape_.kv_heads, shape_.head_dim, shape_.block, shape_.window, shape_.kv == DType::kBF16 ? "bf16" : "fp8",
              static_cast<int>(sequences_.size()), longest, most_rows);
}

AttentionArgs AttentionCase::Args() const {
  AttentionArgs args;
  args.q = q_device_->View(starts_.back(), width());
  args.kv = {keys_device_->data(), values_device_->data(), shape_.kv,      num_blocks_,
             shape_.kv_heads,      shape_.block,           shape_.head_dim};
  args.max_blocks = static_cast<int>(max_blocks_);
  args.num_heads = shape_.heads;
  args.sliding_window = shape_.window;
  args.scale = 1 / std::sqrt(static_cast<float>(shape_.head_dim));
  return args;
}

std::vector<BFloat16> AttentionCase::RunArgs(AttentionArgs args, int64_t first_row, int64_t rows) const {
  const auto out = DeviceArray<BFloat16>::Poisoned(gpu_, rows * width());
  args.q = args.q.Rows(first_row, rows);
  args.out = out.View(rows, width());
  gpu_.ops().PagedAttention(args, gpu_.stream());
  return out.Read(Name());
}

std::vector<BFloat16> AttentionCase::Run(int first, int count) const {
  std::vector<int32_t> starts, lens;
  AttentionArgs args = Args();
  bool leading = true;
  for (int s = first; s < first + count; ++s) {
    starts.push_back(starts_[s] - starts_[first]);
    lens.push_back(sequences_[s].length);
    leading = leading && sequences_[s].rows == 1;
    args.num_decodes += leading ? 1 : 0;
    args.max_query_rows = std::max(args.max_query_rows, sequences_[s].rows);
    args.max_seq_len = std::max<int64_t>(args.max_seq_len, sequences_[s].length);
  }
  starts.push_back(starts_[first + count] - starts_[first]);
  const DeviceArray<int32_t> starts_d(gpu_, starts), lens_d(gpu_, lens);
  args.query_starts = starts_d.data();
  args.seq_lens = lens_d.data();
  args.block_tables = tables_device_->data() + first * max_blocks_;
  args.num_sequences = count;
  return RunArgs(args, starts_[first], starts.back());
}

std::vector<BFloat16> AttentionCase::RunRowAlone(int s, int row) const {
  AttentionArgs args = Args();
  const int32_t length = sequences_[s].length - sequences_[s].rows + row + 1;
  const DeviceArray<int32_t> starts(gpu_, {0, 1}), lens(gpu_, {length});
  args.query_starts = starts.data();
  args.seq_lens = lens.data();
  args.block_tables = tables_device_->data() + s * max_blocks_;
  args.num_sequences = args.num_decodes = args.max_query_rows = 1;
  args.max_seq_len = length;
  return RunArgs(args, starts_[s] + row, 1);
}

void AttentionCase::Reference(int s, int row, int head, double* out) const {
  const int dim = shape_.head_dim, position = sequences_[s].length - sequences_[s].rows + row;
  const int begin = shape_.window > 0 ? std::max(0, position - shape_.window + 1) : 0;
  const int kv_head = head / (shape_.heads / shape_.kv_heads);
  const auto at = [&](int p) {
    const int64_t id = tables_[s * max_blocks_ + p / shape_.block];
    return ((id * shape_.kv_heads + kv_head) * shape_.block + p % shape_.block) * dim;
  };
  const BFloat16* q = &q_[(starts_[s] + row) * width() + int64_t{head} * dim];
  const double scale = 1 / std::sqrt(static_cast<float>(dim));
  std::vector<double> weights;
  double max = -std::numeric_limits<double>::infinity(), sum = 0;
  for (int p = begin; p <= position; ++p) {
    double dot = 0;
    for (int d = 0; d < dim; ++d) dot += double{Widened(q[d])} * keys_[at(p) + d];
    weights.push_back(dot * scale);
    max = std::max(max, weights.back());
  }
  for (double& w : weights) sum += w = std::exp(w - max);
  std::fill_n(out, dim, 0.0);
  for (int p = begin; p <= position; ++p) {
    for (int d = 0; d < dim; ++d) out[d] += weights[p - begin] / sum * values_[at(p) + d];
  }
}

void AttentionCase::Check(const std::vector<BFloat16>& out, int64_t pairs, Random& random, Errors& errors) const {
  struct Pair {
    int s, row, head;
  };
  std::vector<Pair> wanted;
  const int64_t all = starts_.back() * shape_.heads;
  for (int s = 0; s < std::ssize(sequences_); ++s) {
    if (sequences_[s].length == 0) continue;
    const std::vector<BFloat16> rows(out.begin() + starts_[s] * width(), out.begin() + starts_[s + 1] * width());
    ExpectAllFinite(rows, Name() + Text(" sequence %d", s));
    for (int row = 0; row < sequences_[s].rows; ++row) {
      for (int head = 0; head < shape_.heads; ++head) {
        // The first and last row of each sequence in one head, others by chance.
        const bool edge = (row == 0 || row + 1 == sequences_[s].rows) && head == s % shape_.heads;
        if (all <= pairs || (edge && std::ssize(sequences_) <= pairs) || random.Int(0, all - 1) < pairs) {
          wanted.push_back({s, row, head});
        }
      }
    }
  }
  const int dim = shape_.head_dim;
  std::vector<double> ref(wanted.size() * dim);
  Parallel(std::ssize(wanted),
           [&](int64_t i) { Reference(wanted[i].s, wanted[i].row, wanted[i].head, &ref[i * dim]); });
  for (size_t i = 0; i < wanted.size(); ++i) {
    const Pair& pair = wanted[i];
    errors.Row(&out[(starts_[pair.s] + pair.row) * width() + int64_t{pair.head} * dim], &ref[i * dim], dim,
               Name() + Text(" sequence %d (length %d, %d rows) row %d head %d", pair.s, sequences_[pair.s].length,
                             sequences_[pair.s].rows, pair.row, pair.head));
  }
}

}  // namespace soloist
