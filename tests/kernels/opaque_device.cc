#include "tests/kernels/opaque_device.h"

#include <atomic>
#include <bit>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <utility>
#include <vector>

#include "kernels/ops.h"

namespace soloist {
namespace {

std::atomic<int64_t> launches{0};

// Set in an address, it is none that a processor accepts; unset, the memory is there.
constexpr uintptr_t kOpaqueBit = uintptr_t{1} << 62;

template <typename T>
T* Hide(T* p) {
  return std::bit_cast<T*>(std::bit_cast<uintptr_t>(p) | kOpaqueBit);
}
template <typename T>
T* Reveal(T* p) {
  return std::bit_cast<T*>(std::bit_cast<uintptr_t>(p) & ~kOpaqueBit);
}
Tensor Reveal(Tensor t) {
  t.data = Reveal(t.data);
  return t;
}
KvLayer Reveal(KvLayer kv) {
  kv.keys = Reveal(kv.keys);
  kv.values = Reveal(kv.values);
  return kv;
}
// Of a copy of the arguments.
void RevealAll(auto&... members) { ((members = Reveal(members)), ...); }

// What an implementation of PagedAttention may do to the cache.
void SpoilBehindLastKey(const AttentionArgs& a, int sequence) {
  const int keys = a.seq_lens[sequence], used = keys % a.kv.block_size;
  if (used == 0) return;
  const int64_t block = a.block_tables[int64_t{sequence} * a.max_blocks + keys / a.kv.block_size];
  const int64_t slot_bytes = a.kv.head_dim * DTypeBytes(a.kv.dtype);
  for (int head = 0; head < a.kv.num_kv_heads; ++head) {
    const int64_t slot = (block * a.kv.num_kv_heads + head) * a.kv.block_size + used;
    std::memset(static_cast<char*>(a.kv.values) + slot * slot_bytes, 0, (a.kv.block_size - used) * slot_bytes);
  }
}

// Calls of a captured graph, with their arguments.
using Recording = std::vector<std::function<void()>>;

class OpaqueOps final : public Ops {
 public:
  explicit OpaqueOps(Ops& ops) : ops_(ops) {}

  // Null: calls run at once; else they are kept there and do not run.
  void set_recording(Recording* recording) { recording_ = recording; }
  void Do(std::function<void()> call) {
    if (recording_ == nullptr) return call();
    recording_->push_back(std::move(call));
  }

  void Embed(const int32_t* token_ids, const int32_t* previous_tokens, const Tensor& table, const Tensor& out,
             Stream& stream) override {
    Do([=, this, &stream] {
      ops_.Embed(Reveal(token_ids), Reveal(previous_tokens), Reveal(table), Reveal(out), stream);
    });
  }
  void AddRmsNorm(const Tensor& residual, const Tensor& delta, const Tensor& weight, float eps, const Tensor& out,
                  Stream& stream) override {
    Do([=, this, &stream] {
      ops_.AddRmsNorm(Reveal(residual), Reveal(delta), Reveal(weight), eps, Reveal(out), stream);
    });
  }
  void Linear(const Tensor& x, const Tensor& w, const Tensor& out, Stream& stream) override {
    Do([=, this, &stream] { ops_.Linear(Reveal(x), Reveal(w), Reveal(out), stream); });
  }
  void RopeAppendKv(const Tensor& qkv, const int32_t* positions, const int32_t* slot_mapping, const Tensor& cos_sin,
                    const KvLayer& kv, const Tensor& q_out, Stream& stream) override {
    Do([=, this, &stream] {
      ops_.RopeAppendKv(Reveal(qkv), Reveal(positions), Reveal(slot_mapping), Reveal(cos_sin), Reveal(kv),
                        Reveal(q_out), stream);
    });
  }
  void PagedAttention(const AttentionArgs& args, Stream& stream) override {
    AttentionArgs a = args;
    RevealAll(a.q, a.kv, a.query_starts, a.seq_lens, a.block_tables, a.out);
    Do([=, this, &stream] {
      stream.Synchronize().IgnoreError();
      for (int s = a.num_decodes; s < a.num_sequences; ++s) SpoilBehindLastKey(a, s);
      ops_.PagedAttention(a, stream);
    });
  }
  void Route(const RouteArgs& args, Stream& stream) override {
    RouteArgs a = args;
    RevealAll(a.residual, a.delta, a.norm_weight, a.normed, a.gate, a.num_rows, a.experts, a.weights);
    Do([=, this, &stream] { ops_.Route(a, stream); });
  }
  void DispatchRows(const DispatchRowsArgs& args, Stream& stream) override {
    DispatchRowsArgs a = args;
    RevealAll(a.x, a.experts, a.base, a.order, a.slots, a.counts, a.begins, a.dst);
    Do([=, this, &stream] { ops_.DispatchRows(a, stream); });
  }
  // The groups and the weights' descriptions are the caller's: kept as they are now.
  void ExpertMlp(const ExpertMlpArgs& args, Stream& stream) override {
    ExpertMlpArgs a = args;
    std::vector<ExpertRows> groups(a.groups, a.groups + a.num_groups);
    for (ExpertRows& group : groups) RevealAll(group.row_count, group.row_begin_on_device);
    std::vector<Tensor> w_in(a.w_in, a.w_in + a.num_experts), w_out(a.w_out, a.w_out + a.num_experts);
    for (Tensor& w : w_in) RevealAll(w);
    for (Tensor& w : w_out) RevealAll(w);
    RevealAll(a.x, a.row_offsets, a.scratch, a.out);
    Do([=, this, &stream] {
      ExpertMlpArgs call = a;
      call.groups = groups.data();
      call.w_in = w_in.data();
      call.w_out = w_out.data();
      ops_.ExpertMlp(call, stream);
    });
  }
  void CombineRows(const CombineRowsArgs& args, Stream& stream) override {
    CombineRowsArgs a = args;
    RevealAll(a.y, a.slots, a.weights, a.delta, a.residual, a.norm_weight, a.normed);
    Do([=, this, &stream] { ops_.CombineRows(a, stream); });
  }
  void CopyBytes(void* dst, const void* src, int64_t bytes, Stream& stream) override {
    Do([=, this, &stream] { ops_.CopyBytes(Reveal(dst), Reveal(src), bytes, stream); });
  }
  void GatherRows(const Tensor& x, const int32_t* rows, const Tensor& out, Stream& stream) override {
    Do([=, this, &stream] { ops_.GatherRows(Reveal(x), Reveal(rows), Reveal(out), stream); });
  }
  void FillUniform(uint64_t key, float scale, int64_t first_row, const Tensor& out, Stream& stream) override {
    Do([=, this, &stream] { ops_.FillUniform(key, scale, first_row, Reveal(out), stream); });
  }
  void Sample(const SampleArgs& args, Stream& stream) override {
    SampleArgs a = args;
    RevealAll(a.logits, a.params, a.bias, a.history, a.previous_tokens, a.mask_of_row, a.masks, a.targets, a.tokens,
              a.logprobs, a.top_tokens, a.top_logprobs, a.raw_logits);
    Do([=, this, &stream] { ops_.Sample(a, stream); });
  }

 private:
  Ops& ops_;
  Recording* recording_ = nullptr;
};

class OpaqueGraph final : public Graph {
 public:
  explicit OpaqueGraph(Recording recording) : recording_(std::move(recording)) {}
  void Run() const {
    for (const auto& call : recording_) call();
  }

 private:
  const Recording recording_;
};

class OpaqueDevice final : public Device {
 public:
  OpaqueDevice(std::unique_ptr<Device> device, bool captures)
      : device_(std::move(device)), captures_(captures), ops_(device_->ops()) {}
  std::string Name() const override { return "opaque " + device_->Name(); }
  DType activation_dtype() const override { return device_->activation_dtype(); }
  bool host_accessible() const override { return false; }
  absl::StatusOr<Buffer> Allocate(int64_t bytes) override {
    if (bytes == 0) return Buffer();
    constexpr size_t kAlignment = 64;
    const size_t rounded = (static_cast<size_t>(bytes) + kAlignment - 1) / kAlignment * kAlignment;
    void* data = std::aligned_alloc(kAlignment, rounded);
    CHECK(data != nullptr);
    std::memset(data, 0, rounded);
    return Buffer(Hide(data), bytes, [](void* p, int64_t) { std::free(Reveal(p)); });
  }
  absl::StatusOr<Buffer> AllocatePinned(int64_t bytes) override { return device_->AllocatePinned(bytes); }
  absl::StatusOr<std::unique_ptr<Stream>> CreateStream() override { return device_->CreateStream(); }
  absl::StatusOr<std::unique_ptr<Event>> CreateEvent() override { return device_->CreateEvent(); }
  void Wait(Stream& stream, const Event& event) override { device_->Wait(stream, event); }
  void Record(Event& event, Stream& stream) override { device_->Record(event, stream); }
  bool can_capture() const override { return captures_; }
  absl::StatusOr<std::unique_ptr<Graph>> Capture(Stream&, const std::function<absl::Status()>& enqueue) override {
    Recording recording;
    ops_.set_recording(&recording);
    const absl::Status status = enqueue();
    ops_.set_recording(nullptr);
    if (!status.ok()) return status;
    return std::make_unique<OpaqueGraph>(std::move(recording));
  }
  absl::Status Launch(const Graph& graph, Stream&) override {
    static_cast<const OpaqueGraph&>(graph).Run();
    ++launches;
    return absl::OkStatus();
  }
  absl::Status Prepare(const OpLimits& limits) override { return device_->Prepare(limits); }
  void Copy(void* dst, const void* src, int64_t bytes, Stream& stream) override {
    ops_.Do([=, this, &stream] { device_->Copy(Reveal(dst), Reveal(src), bytes, stream); });
  }
  int64_t FreeBytes() const override { return device_->FreeBytes(); }
  Ops& ops() override { return ops_; }

 private:
  const std::unique_ptr<Device> device_;
  const bool captures_;
  OpaqueOps ops_;
};

}  // namespace

std::unique_ptr<Device> CreateOpaqueDevice(std::unique_ptr<Device> device, bool captures) {
  return std::make_unique<OpaqueDevice>(std::move(device), captures);
}

int64_t OpaqueGraphLaunches() { return launches; }

}  // namespace soloist
