// Philox4x32-10: counter-based random numbers (Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2,
// 3", SC'11).
#ifndef SOLOIST_KERNELS_PHILOX_H_
#define SOLOIST_KERNELS_PHILOX_H_

#include <algorithm>
#include <array>
#include <cstdint>

namespace soloist {

inline std::array<uint32_t, 4> Philox4x32(std::array<uint32_t, 4> counter, std::array<uint32_t, 2> key) {
  for (int round = 0; round < 10; ++round) {
    const uint64_t a = uint64_t{0xD2511F53} * counter[0], b = uint64_t{0xCD9E8D57} * counter[2];
    counter = {static_cast<uint32_t>(b >> 32) ^ counter[1] ^ key[0], static_cast<uint32_t>(b),
               static_cast<uint32_t>(a >> 32) ^ counter[3] ^ key[1], static_cast<uint32_t>(a)};
    key[0] += 0x9E3779B9;
    key[1] += 0xBB67AE85;
  }
  return counter;
}

// In (0, 1): 24 bits, never the ends (the largest would round to 1).
inline float ToUnit(uint32_t bits) {
  return std::min((static_cast<float>(bits >> 8) + 0.5f) * 0x1p-24f, 0x1.fffffep-1f);
}

}  // namespace soloist

#endif  // SOLOIST_KERNELS_PHILOX_H_
