// The warp of a decode attention block that deals out items and feeds their keys and values into shared memory.
#ifndef SOLOIST_KERNELS_CUDA_DECODE_ATTENTION_PRODUCER_CUH_
#define SOLOIST_KERNELS_CUDA_DECODE_ATTENTION_PRODUCER_CUH_

#include "kernels/cuda/decode_attention_items.cuh"
#include "kernels/cuda/decode_attention_ptx.cuh"
#include "kernels/cuda/launch.cuh"

namespace soloist::cuda::decode {

constexpr unsigned kAllLanes = 0xffffffff;

// All members are called by the whole warp.
template <int kHeadDim, int kElementBytes>
class Producer {
 public:
  __device__ __forceinline__ Producer(const Params& p, const SharedLayout& layout, unsigned char* shared)
      : p_(p),
        layout_(layout),
        lane_(threadIdx.x % 32),
        starts_(reinterpret_cast<int*>(shared + layout.rows)),
        lens_(starts_ + p.num_rows + 1),
        items_(reinterpret_cast<Item*>(shared + layout.items)),
        entries_(reinterpret_cast<const int*>(shared + layout.entries)),
        base_(SharedAddress(shared)),
        box_keys_(min(1 << p.block_shift, kTileKeys)),
        boxes_(kTileKeys / box_keys_) {}

  // Reads lengths and tables and finds the block's first item.
  __device__ __forceinline__ void Plan() {
    num_items_ = CountChunks() * p_.kv_heads;
    if (static_cast<int>(blockIdx.x) >= num_items_) return;
    work_ = Find(blockIdx.x);
    work_.entry = __ldcg(Entry(work_.item, work_.loaded));
  }

  // Sends the first keys and values on their way into the L2 cache.
  __device__ __forceinline__ void Prefetch() {
    if (static_cast<int>(blockIdx.x) >= num_items_) return;
    const int first = work_.item.begin / kTileKeys;
    const int last = first + min(p_.stages, 32 / boxes_);  // with the table entries that are there
    for (int tile = first; tile * kTileKeys < work_.item.end && tile < last; ++tile) {
      const Boxes boxes = FindBoxes(tile);
      if (!boxes.wanted) continue;
#pragma unroll
      for (int part = 0; part < kParts; ++part) {
        PrefetchTile(&p_.keys, part * kPartElements, boxes.map_row);
        PrefetchTile(&p_.values, part * kPartElements, boxes.map_row);
      }
    }
    __syncwarp();
  }

  // The first item of a block is fixed, the others are drawn. Each is found, and its block table asked for, after the
  // first tile of the one before it, and drawn one earlier still, so that little waits for an answer from memory.
  __device__ __forceinline__ void Run() {
    int drawn = 0;
    if (lane_ == 0) drawn = gridDim.x + atomicAdd(p_.next_item, 1);
    int index = blockIdx.x;
    while (index < num_items_) {
      int tile = work_.item.begin / kTileKeys;
      Feed(tile, true);
      const int next = __shfl_sync(kAllLanes, drawn, 0);
      Work after = work_;
      if (next < num_items_) {
        after = Find(next);
        asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(base_ + layout_.entries + lane_ * 4),
                     "l"(Entry(after.item, after.loaded))
                     : "memory");
        if (lane_ == 0) drawn = gridDim.x + atomicAdd(p_.next_item, 1);
      }
      while (++tile * kTileKeys < work_.item.end) Feed(tile, false);
      index = next;
      work_ = after;
      asm volatile("cp.async.wait_all;" ::: "memory");
      work_.entry = entries_[lane_];
    }
    BarrierWait(Full() + kEmptyKeys, phase_);
    if (lane_ == 0) {
      items_[stage_].row = -1;
      BarrierArrive(Full());
      // The last block to have drawn its last item resets the counters for the next launch.
      if (atomicAdd(p_.next_item + 1, 1) == static_cast<int>(gridDim.x) - 1) {
        p_.next_item[0] = 0;
        p_.next_item[1] = 0;
      }
    }
  }

 private:
  static constexpr int kTileKeys = TileKeys(kHeadDim, kElementBytes);
  // What a tile keeps of a key side by side; wider heads are kParts such tiles one after the other.
  static constexpr int kRowBytes = kHeadDim * kElementBytes < 128 ? kHeadDim * kElementBytes : 128;
  static constexpr int kParts = kHeadDim * kElementBytes / kRowBytes;
  static constexpr int kPartElements = kRowBytes / kElementBytes;

  // An item and, in each lane i, entry loaded + i of its row's block table.
  struct Work {
    Item item;
    int loaded;
    int entry;
  };

  // This lane's box of a tile, which is made of one box for each block that it meets.
  struct Boxes {
    bool wanted;
    int map_row;
    uint32_t bytes;  // of all lanes
  };

  __device__ __forceinline__ uint32_t Full() const { return base_ + layout_.stage_barriers + stage_ * kStageBarriers; }

  __device__ __forceinline__ int ChunkKeysOf(int begin, int len) const {
    return static_cast<int>(ChunkKeys(len - begin, p_.chunk_keys));
  }
  __device__ __forceinline__ int BeginOf(int len) const { return p_.window > 0 ? max(0, len - p_.window) : 0; }

  // starts_[r] = chunks of the rows before r, lens_[r] = keys of row r. Returns starts_[num_rows].
  __device__ __forceinline__ int CountChunks() {
    int total = 0;
#pragma unroll 4
    for (int base = 0; base < p_.num_rows; base += 32) {
      const int row = base + lane_;
      const int len = row < p_.num_rows ? min(__ldcg(p_.kv_lens + row), p_.max_len) : 0;
      int chunks = 0;
      if (len > 0) {
        const int begin = BeginOf(len);
        chunks = NumChunks(begin, len, ChunkKeysOf(begin, len));
      }
      int sum = chunks;
#pragma unroll
      for (int d = 1; d < 32; d *= 2) {
        const int left = __shfl_up_sync(kAllLanes, sum, d);
        if (lane_ >= d) sum += left;
      }
      if (row < p_.num_rows) {
        starts_[row] = total + sum - chunks;
        lens_[row] = len;
      }
      total += __shfl_sync(kAllLanes, sum, 31);
    }
    if (lane_ == 0) starts_[p_.num_rows] = total;
    __syncwarp();
    return total;
  }

  // Without its entry. Items are ordered by row, then kv head, then chunk, so that the chunks of a pair finish close
  // together.
  __device__ __forceinline__ Work Find(int index) const {
    const int chunk_index = index / p_.kv_heads;
    int row = 0;
    for (int rows = p_.num_rows; rows > 1;) {  // the last row with starts_[row] <= chunk_index
      const int half = rows / 2;
      if (starts_[row + half] <= chunk_index) row += half;
      rows -= half;
    }
    Work work;
    Item& item = work.item;
    item.row = row;
    item.num_chunks = starts_[row + 1] - starts_[row];
    const int local = index - starts_[row] * p_.kv_heads;
    item.head = local / item.num_chunks;
    item.chunk = local - item.head * item.num_chunks;
    const int len = lens_[row];
    const int begin = BeginOf(len);
    const int chunk_keys = ChunkKeysOf(begin, len);
    const int chunk_begin = (begin / chunk_keys + item.chunk) * chunk_keys;
    item.begin = max(begin, chunk_begin);
    item.end = item.chunk == item.num_chunks - 1 ? len : chunk_begin + chunk_keys;
    work.loaded = item.begin / kTileKeys * kTileKeys >> p_.block_shift;
    return work;
  }

  // Where the table entry lies that this lane keeps when those from `block` on are kept.
  __device__ __forceinline__ const int32_t* Entry(const Item& item, int block) const {
    const int last_block = (item.end - 1) >> p_.block_shift;
    return p_.block_tables + static_cast<int64_t>(item.row) * p_.max_blocks + min(block + lane_, last_block);
  }

  __device__ __forceinline__ Boxes FindBoxes(int tile) {
    const int block = tile * kTileKeys >> p_.block_shift;
    if (block + boxes_ > work_.loaded + 32) {
      work_.loaded = block;
      work_.entry = __ldcg(Entry(work_.item, block));
    }
    const int id = __shfl_sync(kAllLanes, work_.entry, block - work_.loaded + (lane_ < boxes_ ? lane_ : 0));
    const int key = tile * kTileKeys + lane_ * box_keys_;
    Boxes boxes;
    boxes.wanted = lane_ < boxes_ && key < work_.item.end && key + box_keys_ > work_.item.begin;
    boxes.map_row = ((id * p_.kv_heads + work_.item.head) << p_.block_shift) + (key & ((1 << p_.block_shift) - 1));
    boxes.bytes = __popc(__ballot_sync(kAllLanes, boxes.wanted)) * box_keys_ * kRowBytes * kParts;
    return boxes;
  }

  __device__ __forceinline__ void Copy(const Boxes& boxes, const CUtensorMap* map, uint32_t tile,
                                       uint32_t barrier) const {
    if (!boxes.wanted) return;
#pragma unroll
    for (int part = 0; part < kParts; ++part) {
      CopyTile(tile + (part * kTileKeys + lane_ * box_keys_) * kRowBytes, map, part * kPartElements, boxes.map_row,
               barrier, p_.policy);
    }
  }

  // Sends a tile, and in front of an item's first one the item and its queries.
  __device__ __forceinline__ void Feed(int tile, bool first) {
    const Boxes boxes = FindBoxes(tile);
    const uint32_t full = Full();
    const uint32_t keys = base_ + stage_ * 2 * layout_.tile_bytes;
    BarrierWait(full + kEmptyKeys, phase_);
    if (lane_ == 0) {
      if (first) items_[stage_] = work_.item;
      BarrierArriveExpect(full, boxes.bytes + (first ? layout_.q_bytes : 0));
      if (first) {
        CopyBytes(base_ + layout_.q + stage_ * layout_.q_bytes,
                  p_.q + work_.item.row * p_.q_stride + static_cast<int64_t>(work_.item.head) * p_.group * kHeadDim,
                  layout_.q_bytes, full);
      }
    }
    __syncwarp();
    Copy(boxes, &p_.keys, keys, full);
    BarrierWait(full + kEmptyValues, phase_);
    if (lane_ == 0) BarrierArriveExpect(full + kFullValues, boxes.bytes);
    __syncwarp();
    Copy(boxes, &p_.values, keys + layout_.tile_bytes, full + kFullValues);
    if (++stage_ == p_.stages) {
      stage_ = 0;
      phase_ ^= 1;
    }
  }

  const Params& p_;
  const SharedLayout& layout_;
  const int lane_;
  int* const starts_;
  int* const lens_;
  Item* const items_;
  const int* const entries_;
  const uint32_t base_;
  const int box_keys_;
  const int boxes_;
  int stage_ = 0;
  uint32_t phase_ = 1;  // the first wait for an empty stage passes
  int num_items_ = 0;
  Work work_;  // in hand
};

}  // namespace soloist::cuda::decode

#endif  // SOLOIST_KERNELS_CUDA_DECODE_ATTENTION_PRODUCER_CUH_
