#include "kernels/cpu/cpu_ops.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <numeric>

#include "kernels/cpu/simd.h"
#include "kernels/uniform.h"

namespace soloist {
namespace {

// Rows of cheap work that are worth a task of their own.
constexpr int64_t kRowsPerTask = 16;

class CpuOps final : public Ops {
 public:
  CpuOps(ThreadPool& pool, const GemmKernel& gemm) : pool_(pool), gemm_(gemm) {}

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
    CHECK_EQ(weight.cols, residual.cols);
    ForRows(residual.rows, [&](int64_t i) {
      AddNormRow(residual, i, delta.data != nullptr ? delta.row<const float>(i) : nullptr, weight, eps, out);
    });
  }

  void Linear(const Tensor& x, const Tensor& w, const Tensor& out, Stream&) override {
    CHECK_EQ(x.cols, w.cols);
    CHECK_EQ(out.cols, w.rows);
    CHECK_EQ(x.rows, out.rows);
    if (x.rows == 0) return;
    const int64_t n = w.rows, block = GemmBlock(gemm_, x.rows, n, pool_.threads());
    const RowSet from{x.as<float>(), x.stride}, to{out.as<float>(), out.stride};
    pool_.ParallelFor((n + block - 1) / block, [&](int64_t b) {
      GemmColumns(gemm_, from, to, x.rows, w, b * block, std::min(n, (b + 1) * block));
    });
  }

  void RopeAppendKv(const Tensor& qkv, const int32_t* positions, const int32_t* slot_mapping, const Tensor& cos_sin,
                    const KvLayer& kv, const Tensor& q_out, Stream&) override {
    const int64_t dim = kv.head_dim, q_heads = q_out.cols / dim;
    CHECK_EQ(qkv.cols, q_out.cols + 2 * kv.num_kv_heads * dim);
    CHECK(kv.dtype == DType::kF32 || kv.dtype == DType::kBF16);
    ForRows(qkv.rows, [&](int64_t i) {
      CHECK(positions[i] >= 0 && positions[i] < cos_sin.rows);
      CHECK(slot_mapping[i] < kv.num_blocks * kv.block_size);
      const float* in = qkv.row<const float>(i);
      const float* rotation = cos_sin.row<const float>(positions[i]);
      for (int64_t h = 0; h < q_heads; ++h) Rotate(in + h * dim, rotation, dim, q_out.row<float>(i) + h * dim);
      if (slot_mapping[i] < 0) return;
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

  void Route(const RouteArgs& args, Stream&) override {
    const int64_t n = args.gate.rows, k = args.experts.cols, hidden = args.residual.cols;
    CHECK_LE(n, kMaxExperts);
    CHECK(args.norm_weight.cols == hidden && args.gate.cols == hidden);
    const BFloat16* gates[kMaxExperts];
    for (int64_t e = 0; e < n; ++e) gates[e] = args.gate.row<const BFloat16>(e);
    const int64_t real_rows = args.num_rows != nullptr ? *args.num_rows : args.residual.rows;
    ForRows(args.residual.rows, [&](int64_t i) {
      int32_t* chosen = args.experts.row<int32_t>(i);
      float* weight = args.weights.row<float>(i);
      if (i >= real_rows) {
        std::fill_n(chosen, k, -1);
        std::fill_n(weight, k, 0.0f);
        return;
      }
      AddNormRow(args.residual, i, args.delta.data != nullptr ? args.delta.row<const float>(i) : nullptr,
                 args.norm_weight, args.eps, args.normed);
      float logits[kMaxExperts];
      DotRows(args.normed.row<const float>(i), gates, static_cast<int>(n), hidden, 1.0f, logits);
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

  void DispatchRows(const DispatchRowsArgs& args, Stream&) override {
    const Tensor& experts = args.experts;
    CHECK_LE(args.num_experts, kMaxExperts);
    std::fill_n(args.counts, args.num_experts, 0);
    for (int64_t i = 0; i < experts.rows; ++i) {
      for (int64_t j = 0; j < experts.cols; ++j) {
        const int32_t e = experts.row<const int32_t>(i)[j];
        CHECK(e < args.num_experts);
        args.slots.row<int32_t>(i)[j] = e < 0 ? -1 : args.counts[e]++;
      }
    }
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
    if (args.begins != nullptr) {
      for (int e = 0; e < args.num_experts; ++e) args.begins[e] = static_cast<int32_t>(base[e]);
      if (args.base == nullptr) {
        args.begins[args.num_experts] = std::accumulate(args.counts, args.counts + args.num_experts, 0);
      }
    }
    const int64_t room = args.base != nullptr && args.room > 0 ? args.room : INT64_MAX;
    ForRows(args.x.rows, [&](int64_t i) {
      for (int64_t j = 0; j < experts.cols; ++j) {
        int32_t& slot = args.slots.row<int32_t>(i)[j];
        if (slot >= room) slot = -1;
        if (slot < 0) continue;
        slot += static_cast<int32_t>(base[experts.row<const int32_t>(i)[j]]);
        CopyRow(args.x, i, args.dst, slot);
      }
    });
    int32_t sent[kMaxExperts];
    for (int e = 0; e < args.num_experts; ++e) {
      sent[e] = static_cast<int32_t>(std::min<int64_t>(args.counts[e], room));
    }
    // Last, so that rows beyond an expert's room (a row that chose it twice) do not hide that from the receiver.
    for (int r = 0; r < args.num_headers; ++r) {
      std::memcpy(static_cast<char*>(args.dst.data) + r * args.header_stride_bytes, sent,
                  args.num_experts * sizeof(int32_t));
    }
  }

  void ExpertMlp(const ExpertMlpArgs& args, Stream&) override { CpuExpertMlp(args, gemm_, pool_); }

  void CombineRows(const CombineRowsArgs& args, Stream&) override {
    // A row's sum is made where it stays, or where its norm will overwrite it.
    const Tensor& sums = args.delta.data != nullptr ? args.delta : args.normed;
    const int64_t hidden = sums.cols;
    CHECK(args.slots.rows == 0 || args.delta.data != nullptr || args.residual.data != nullptr);
    ForRows(args.slots.rows, [&](int64_t i) {
      float* sum = sums.row<float>(i);
      std::fill_n(sum, hidden, 0.0f);
      for (int64_t j = 0; j < args.slots.cols; ++j) {
        const int32_t slot = args.slots.row<const int32_t>(i)[j];
        if (slot < 0) continue;
        CHECK(slot < args.y.rows);
        Axpy(args.weights.row<const float>(i)[j], args.y.row<const float>(slot), sum, hidden);
      }
      if (args.residual.data != nullptr) AddNormRow(args.residual, i, sum, args.norm_weight, args.eps, args.normed);
    });
  }

  void CopyBytes(void* dst, const void* src, int64_t bytes, Stream&) override {
    if (bytes > 0) std::memcpy(dst, src, bytes);
  }

  void GatherRows(const Tensor& x, const int32_t* rows, const Tensor& out, Stream&) override {
    ForRows(out.rows, [&](int64_t i) {
      CHECK(rows[i] >= 0 && rows[i] < x.rows);
      CopyRow(x, rows[i], out, i);
    });
  }

  void FillUniform(uint64_t key, float scale, int64_t first_row, const Tensor& out, Stream&) override {
    ForRows(out.rows, [&](int64_t i) {
      constexpr int64_t kPart = 512;
      float part[kPart];
      for (int64_t begin = 0; begin < out.cols; begin += kPart) {
        const int64_t count = std::min(kPart, out.cols - begin), first = (first_row + i) * out.cols + begin;
        for (int64_t j = 0; j < count; ++j) part[j] = UniformAt(key, first + j, scale);
        if (out.dtype == DType::kF32) {
          std::copy_n(part, count, out.row<float>(i) + begin);
        } else {
          Narrow(part, out.row<BFloat16>(i) + begin, count);
        }
      }
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

  // residual[i] += delta (unless null); out[i] = RMSNorm(residual[i]). `delta` may be out's row.
  static void AddNormRow(const Tensor& residual, int64_t i, const float* delta, const Tensor& weight, float eps,
                         const Tensor& out) {
    const int64_t n = residual.cols;
    const float* w = weight.as<const float>();
    float* x = residual.row<float>(i);
    if (delta != nullptr) Axpy(1.0f, delta, x, n);
    const float scale = 1.0f / std::sqrt(Dot(x, x, n) / static_cast<float>(n) + eps);
    float* y = out.row<float>(i);
    for (int64_t j = 0; j < n; ++j) y[j] = x[j] * scale * w[j];
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
  const GemmKernel& gemm_;
};

}  // namespace

std::unique_ptr<Ops> CreateCpuOps(ThreadPool& pool, const GemmKernel& gemm) {
  return std::make_unique<CpuOps>(pool, gemm);
}

}  // namespace soloist
