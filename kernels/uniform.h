// The numbers of dummy weights: each a function of (key, index) alone, the same on every backend, so that a rank can
// fill any part of a matrix anywhere.
#ifndef SOLOIST_KERNELS_UNIFORM_H_
#define SOLOIST_KERNELS_UNIFORM_H_

#include <cstdint>

#ifdef __CUDACC__
#define SOLOIST_HOST_DEVICE __host__ __device__
#else
#define SOLOIST_HOST_DEVICE
#endif

namespace soloist {

// SplitMix64 (Steele, Lea, Flood, OOPSLA'14): a well-mixed 64-bit function of its input.
SOLOIST_HOST_DEVICE inline uint64_t MixBits(uint64_t x) {
  x += 0x9e3779b97f4a7c15;
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9;
  x = (x ^ (x >> 27)) * 0x94d049bb133111eb;
  return x ^ (x >> 31);
}

// In [-scale, scale), 16 bits. Elements 4i .. 4i + 3 share one mix: `draw` is MixBits(key + index / 4).
SOLOIST_HOST_DEVICE inline float UniformOfDraw(uint64_t draw, int64_t index, float scale) {
  const int32_t u = static_cast<int32_t>((draw >> (16 * (index & 3))) & 0xffff) - 32768;
  return static_cast<float>(u) * (scale / 32768.0f);
}
SOLOIST_HOST_DEVICE inline float UniformAt(uint64_t key, int64_t index, float scale) {
  return UniformOfDraw(MixBits(key + static_cast<uint64_t>(index) / 4), index, scale);
}

}  // namespace soloist

#endif  // SOLOIST_KERNELS_UNIFORM_H_
