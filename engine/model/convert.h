// Conversions between the 16- and 32-bit floats of checkpoints. Bit arithmetic only: the same on every machine.
#ifndef SOLOIST_ENGINE_MODEL_CONVERT_H_
#define SOLOIST_ENGINE_MODEL_CONVERT_H_

#include <bit>
#include <cstdint>

#include "kernels/tensor.h"

namespace soloist {

inline float ToFloat(BFloat16 value) { return std::bit_cast<float>(static_cast<uint32_t>(value.bits) << 16); }

// Round to nearest, ties to even; NaN stays NaN (quiet).
inline BFloat16 ToBFloat16(float value) {
  const uint32_t bits = std::bit_cast<uint32_t>(value);
  if ((bits & 0x7fffffff) > 0x7f800000) return {static_cast<uint16_t>((bits >> 16) | 0x40)};
  return {static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16)};
}

// IEEE binary16, subnormals, infinities and NaN included; exact.
inline float HalfToFloat(uint16_t half) {
  const uint32_t sign = static_cast<uint32_t>(half & 0x8000) << 16, exponent = (half >> 10) & 31,
                 mantissa = half & 0x3ff;
  if (exponent == 31) return std::bit_cast<float>(sign | 0x7f800000 | (mantissa << 13));
  if (exponent != 0) return std::bit_cast<float>(sign | ((exponent + 112) << 23) | (mantissa << 13));
  const float magnitude = static_cast<float>(mantissa) * 0x1p-24f;
  return sign != 0 ? -magnitude : magnitude;
}

}  // namespace soloist

#endif  // SOLOIST_ENGINE_MODEL_CONVERT_H_
