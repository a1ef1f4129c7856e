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
        base_(SharedAddress(shared)),
        box_keys_(min(1 << p.block_shift, kTileKeys)),
        boxes_(kTileKeys / box_keys_) {}

  // May run before the kernels before this one have ended: takes what it finds in lengths and tables for a guess of the
  // first item, and starts its keys and values on their way into the L2 cache.
  __device__ __forceinline__ void Guess() {
    if (p_.table_rows != nullptr) return;  // not safe to follow before it is known to be written
    num_items_ = CountChunks() * p_.kv_heads;
    guessed_ = true;
    if (static_cast<int>(blockIdx.x) >= num_items_) return;
    Locate(blockIdx.x);
    const int first = item_.begin / kTileKeys;
    const int last = first + min(p_.stages, 32 / boxes_);  // with the table entries that are there
    for (int tile = first; tile * kTileKeys < item_.end && tile < last; ++tile) {
      const Boxes boxes = FindBoxes(tile);
      if (!boxes.wanted) continue;
#pragma unroll
      for (int part = 0; part < kParts; ++part) {
        PrefetchTile(&p_.keys, part * kPartElements, boxes.map_row, p_.policy);
        PrefetchTile(&p_.values, part * kPartElements, boxes.map_row, p_.policy);
      }
    }
    __syncwarp();
  }

  __device__ __forceinline__ void Run() {
    int index = blockIdx.x;
    if (!guessed_ || !Confirm()) {
      num_items_ = CountChunks() * p_.kv_heads;
      if (index < num_items_) Locate(index);
    }
    while (index < num_items_) {
      int next = 0;  // not needed before the end of this item
      if (lane_ == 0) next = gridDim.x + atomicAdd(p_.next_item, 1);
      const int first = item_.begin / kTileKeys;
      for (int tile = first; tile * kTileKeys < item_.end; ++tile) Feed(tile, tile == first);
      index = __shfl_sync(kAllLanes, next, 0);
      if (index < num_items_) Locate(index);
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
        const int chunk_keys = ChunkKeysOf(begin, len);
        chunks = (len - 1) / chunk_keys - begin / chunk_keys + 1;
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

  // Whether the guess was right.
  __device__ __forceinline__ bool Confirm() {
    bool same = true;
    if (static_cast<int>(blockIdx.x) < num_items_) same = LoadEntry(loaded_) == entry_;
    for (int row = lane_; row < p_.num_rows; row += 32) same &= min(__ldcg(p_.kv_lens + row), p_.max_len) == lens_[row];
    return __all_sync(kAllLanes, same);
  }

  // Makes item_ the item of this index. Items are ordered by row, then kv head, then chunk, so that the chunks of a
  // pair finish close together.
  __device__ __forceinline__ void Locate(int index) {
    const int chunk_index = index / p_.kv_heads;
    int row = 0;
    for (int rows = p_.num_rows; rows > 1;) {  // the last row with starts_[row] <= chunk_index
      const int half = rows / 2;
      if (starts_[row + half] <= chunk_index) row += half;
      rows -= half;
    }
    item_.row = row;
    item_.num_chunks = starts_[row + 1] - starts_[row];
    const int local = index - starts_[row] * p_.kv_heads;
    item_.head = local / item_.num_chunks;
    item_.chunk = local - item_.head * item_.num_chunks;
    const int len = lens_[row];
    const int begin = BeginOf(len);
    const int chunk_keys = ChunkKeysOf(begin, len);
    const int chunk_begin = (begin / chunk_keys + item_.chunk) * chunk_keys;
    item_.begin = max(begin, chunk_begin);
    item_.end = min(len, chunk_begin + chunk_keys);
    loaded_ = item_.begin / kTileKeys * kTileKeys >> p_.block_shift;
    entry_ = LoadEntry(loaded_);
  }

  // The table entry of the item's row that this lane keeps when those from `block` on are kept.
  __device__ __forceinline__ int LoadEntry(int block) const {
    const int table_row = p_.table_rows != nullptr ? __ldcg(p_.table_rows + item_.row) : item_.row;
    const int last_block = (item_.end - 1) >> p_.block_shift;
    return __ldcg(p_.block_tables + static_cast<int64_t>(table_row) * p_.max_blocks + min(block + lane_, last_block));
  }

  __device__ __forceinline__ Boxes FindBoxes(int tile) {
    const int block = tile * kTileKeys >> p_.block_shift;
    if (block + boxes_ > loaded_ + 32) {
      loaded_ = block;
      entry_ = LoadEntry(block);
    }
    const int id = __shfl_sync(kAllLanes, entry_, block - loaded_ + (lane_ < boxes_ ? lane_ : 0));
    const int key = tile * kTileKeys + lane_ * box_keys_;
    Boxes boxes;
    boxes.wanted = lane_ < boxes_ && key < item_.end && key + box_keys_ > item_.begin;
    boxes.map_row = ((id * p_.kv_heads + item_.head) << p_.block_shift) + (key & ((1 << p_.block_shift) - 1));
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
      if (first) items_[stage_] = item_;
      BarrierArriveExpect(full, boxes.bytes + (first ? layout_.q_bytes : 0));
      if (first) {
        CopyBytes(base_ + layout_.q + stage_ * layout_.q_bytes,
                  p_.q + item_.row * p_.q_stride + static_cast<int64_t>(item_.head) * p_.group * kHeadDim,
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
  const uint32_t base_;
  const int box_keys_;
  const int boxes_;
  int stage_ = 0;
  uint32_t phase_ = 1;  // the first wait for an empty stage passes
  bool guessed_ = false;
  int num_items_ = 0;
  Item item_;
  int loaded_ = 0;  // this lane holds table entry loaded_ + lane of the item's row
  int entry_ = 0;
};

}  // namespace soloist::cuda::decode

#endif  // SOLOIST_KERNELS_CUDA_DECODE_ATTENTION_PRODUCER_CUH_
