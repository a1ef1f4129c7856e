#include "kernels/cpu/cpu_ops.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "kernels/cpu/simd.h"

namespace soloist {
namespace {

// Rows of cheap work that are worth a task of their own.
constexpr int64_t kRowsPerTask = 16;

class CpuOps final : public Ops {
 public:
  explicit CpuOps(ThreadPool& pool) : pool_(pool) {}

  void Embed(const int32_t* token_ids, const int32_t* previous_tokens, const Tensor& table, const Tensor& out,
             Stream&) override {
    CHECK_EQ(table.cols, out.cols);
    ForRows(out.rows, [&](int64_t i) {
      const int32_t id = token_ids[i] >= 0 ? token_ids[i] : previous_tokens[-1 - token_ids[i]];
      CHECK(id >= 0 && id < table.rows);
      Widen(table.row<const BFloat16>(id), out.row<float>(i), out.cols);
    });
  }

  void AddRmsNorm(const Tensor& residual, const Tensor& delta, const Tensor& weight, float eps, const Tensor& out,
                  Stream&) override {
    const int64_t n = residual.cols;
    CHECK_EQ(weight.cols, n);
    const float* w = weight.as<const float>();
    ForRows(residual.rows, [&](int64_t i) {
      float* x = residual.row<float>(i);
      if (delta.data != nullptr) Axpy(1.0f, delta.row<const float>(i), x, n);
      const float scale = 1.0f / std::sqrt(Dot(x, x, n) / static_cast<float>(n) + eps);
      float* y = out.row<float>(i);
      for (int64_t j = 0; j < n; ++j) y[j] = x[j] * scale * w[j];
    });
  }

  void Linear(const Tensor& x, const Tensor& w, const Tensor& out, Stream&) override {
    CHECK_EQ(x.cols, w.cols);
    CHECK_EQ(out.cols, w.rows);
    CHECK_EQ(x.rows, out.rows);
    if (x.rows == 0) return;
    const int64_t n = w.rows, block = GemmBlock(x.rows, n, pool_.threads());
    const RowSet from{x.as<float>(), x.stride}, to{out.as<float>(), out.stride};
    pool_.ParallelFor((n + block - 1) / block,
                      [&](int64_t b) { GemmColumns(from, to, x.rows, w, b * block, std::min(n, (b + 1) * block)); });
  }

  void RopeAppendKv(const Tensor& qkv, const int32_t* positions, const int32_t* slot_mapping, const Tensor& cos_sin,
                    const KvLayer& kv, const Tensor& q_out, Stream&) override {
    const int64_t dim = kv.head_dim, q_heads = q_out.cols / dim;
    CHECK_EQ(qkv.cols, q_out.cols + 2 * kv.num_kv_heads * dim);
    ForRows(qkv.rows, [&](int64_t i) {
      CHECK(positions[i] >= 0 && positions[i] < cos_sin.rows);
      CHECK(slot_mapping[i] >= 0 && slot_mapping[i] < kv.num_blocks * kv.block_size);
      const float* in = qkv.row<const float>(i);
      const float* rotation = cos_sin.row<const float>(positions[i]);
      for (int64_t h = 0; h < q_heads; ++h) Rotate(in + h * dim, rotation, dim, q_out.row<float>(i) + h * dim);
      const float* k = in + q_heads * dim;
      const float* v = k + kv.num_kv_heads * dim;
      const int64_t block = slot_mapping[i] / kv.block_size, slot = slot_mapping[i] % kv.block_size;
      for (int64_t h = 0; h < kv.num_kv_heads; ++h) {
        const int64_t at = ((block * kv.num_kv_heads + h) * kv.block_size + slot) * dim;
        if (kv.dtype == DType::kF32) {
          Rotate(k + h * dim, rotation, dim, static_cast<float*>(kv.keys) + at);
          std::memcpy(static_cast<float*>(kv.values) + at, v + h * dim, dim * sizeof(float));
        } else {
          float rotated[4096];
          CHECK_LE(dim, 4096);
          Rotate(k + h * dim, rotation, dim, rotated);
          Narrow(rotated, static_cast<BFloat16*>(kv.keys) + at, dim);
          Narrow(v + h * dim, static_cast<BFloat16*>(kv.values) + at, dim);
        }
      }
    });
  }

  void PagedAttention(const AttentionArgs& args, Stream&) override { CpuPagedAttention(args, pool_); }

  void Route(const Tensor& x, const Tensor& gate, const Tensor& experts, const Tensor& weights, Stream&) override {
    const int64_t n = gate.rows, k = experts.cols;
    CHECK_LE(n, kMaxExperts);
    const BFloat16* gates[kMaxExperts];
    for (int64_t e = 0; e < n; ++e) gates[e] = gate.row<const BFloat16>(e);
    ForRows(x.rows, [&](int64_t i) {
      float logits[kMaxExperts];
      DotRows(x.row<const float>(i), gates, static_cast<int>(n), x.cols, 1.0f, logits);
      int32_t* chosen = experts.row<int32_t>(i);
      float* weight = weights.row<float>(i);
      for (int64_t j = 0; j < k; ++j) {
        int64_t best = 0;
        for (int64_t e = 1; e < n; ++e) {
          if (logits[e] > logits[best]) best = e;
        }
        chosen[j] = static_cast<int32_t>(best);
        weight[j] = logits[best];
        logits[best] = -std::numeric_limits<float>::infinity();
      }
      const float max = weight[0];
      float sum = 0;
      for (int64_t j = 0; j < k; ++j) sum += weight[j] = std::exp(weight[j] - max);
      for (int64_t j = 0; j < k; ++j) weight[j] /= sum;
    });
  }

  void AssignSlots(const AssignSlotsArgs& args, Stream&) override {
    std::fill_n(args.counts, args.num_experts, 0);
    const Tensor& experts = args.experts;
    for (int64_t i = 0; i < experts.rows; ++i) {
      for (int64_t j = 0; j < experts.cols; ++j) {
        const int32_t e = experts.row<const int32_t>(i)[j];
        CHECK(e >= 0 && e < args.num_experts);
        args.slots.row<int32_t>(i)[j] = args.counts[e]++;
      }
    }
    CHECK_LE(args.num_experts, kMaxExperts);
    int64_t base[kMaxExperts];
    if (args.base != nullptr) {
      std::copy_n(args.base, args.num_experts, base);
    } else {
      int64_t at = 0;
      for (int o = 0; o < args.num_experts; ++o) {
        base[args.order[o]] = at;
        at += args.counts[args.order[o]];
      }
    }
    for (int64_t i = 0; i < experts.rows; ++i) {
      for (int64_t j = 0; j < experts.cols; ++j) {
        args.slots.row<int32_t>(i)[j] += static_cast<int32_t>(base[experts.row<const int32_t>(i)[j]]);
      }
    }
  }

  void ScatterRows(const Tensor& x, const Tensor& slots, const Tensor& dst, Stream&) override {
    ForRows(x.rows, [&](int64_t i) {
      for (int64_t j = 0; j < slots.cols; ++j) CopyRow(x, i, dst, slots.row<const int32_t>(i)[j]);
    });
  }

  void ExpertMlp(const ExpertMlpArgs& args, Stream&) override { CpuExpertMlp(args, pool_); }

  void CombineRows(const Tensor& y, const Tensor& slots, const Tensor& weights, const Tensor& out, Stream&) override {
    ForRows(out.rows, [&](int64_t i) {
      float* sum = out.row<float>(i);
      std::fill_n(sum, out.cols, 0.0f);
      for (int64_t j = 0; j < slots.cols; ++j) {
        const int32_t slot = slots.row<const int32_t>(i)[j];
        CHECK(slot >= 0 && slot < y.rows);
        Axpy(weights.row<const float>(i)[j], y.row<const float>(slot), sum, out.cols);
      }
    });
  }

  void GatherRows(const Tensor& x, const int32_t* rows, const Tensor& out, Stream&) override {
    ForRows(out.rows, [&](int64_t i) {
      CHECK(rows[i] >= 0 && rows[i] < x.rows);
      CopyRow(x, rows[i], out, i);
    });
  }

  void Sample(const SampleArgs& args, Stream&) override { CpuSample(args, pool_); }

 private:
  static constexpr int64_t kMaxExperts = 4096;

  template <typename Function>
  void ForRows(int64_t rows, const Function& function) {
    pool_.ParallelFor((rows + kRowsPerTask - 1) / kRowsPerTask, [&](int64_t task) {
      for (int64_t i = task * kRowsPerTask; i < std::min(rows, (task + 1) * kRowsPerTask); ++i) function(i);
    });
  }

  static void CopyRow(const Tensor& from, int64_t i, const Tensor& to, int64_t j) {
    CHECK(j >= 0 && j < to.rows);
    std::memcpy(to.row<float>(j), from.row<const float>(i), from.cols * sizeof(float));
  }

  // (a, b) -> (a cos - b sin, b cos + a sin) for the pairs (d, d + dim / 2).
  static void Rotate(const float* in, const float* cos_sin, int64_t dim, float* out) {
    const int64_t half = dim / 2;
    const float* cos = cos_sin;
    const float* sin = cos_sin + half;
    for (int64_t d = 0; d < half; ++d) {
      const float a = in[d], b = in[half + d];
      out[d] = a * cos[d] - b * sin[d];
      out[half + d] = b * cos[d] + a * sin[d];
    }
  }

  ThreadPool& pool_;
};

}  // namespace

std::unique_ptr<Ops> CreateCpuOps(ThreadPool& pool) { return std::make_unique<CpuOps>(pool); }

}  // namespace soloist
