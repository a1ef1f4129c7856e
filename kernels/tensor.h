// Tensor: a non-owning, row-major view of device memory. The only thing that ops take besides plain numbers.
#ifndef SOLOIST_KERNELS_TENSOR_H_
#define SOLOIST_KERNELS_TENSOR_H_

#include <cstdint>
#include <type_traits>

#include "base/check.h"

namespace soloist {

// bfloat16 as its bits: the upper half of a float32.
struct BFloat16 {
  uint16_t bits;
};
static_assert(sizeof(BFloat16) == 2);

// kF8E4M3: 8 bits, largest finite value 448 (OCP 8-bit floating point specification); for cached keys and values only.
enum class DType : uint8_t { kF32, kBF16, kI32, kF8E4M3 };

constexpr int64_t DTypeBytes(DType dtype) { return dtype == DType::kF8E4M3 ? 1 : dtype == DType::kBF16 ? 2 : 4; }

template <typename T>
constexpr DType DTypeOf() {
  if constexpr (std::is_same_v<std::remove_const_t<T>, float>) {
    return DType::kF32;
  } else if constexpr (std::is_same_v<std::remove_const_t<T>, BFloat16>) {
    return DType::kBF16;
  } else {
    static_assert(std::is_same_v<std::remove_const_t<T>, int32_t>);
    return DType::kI32;
  }
}

// [rows, cols], consecutive within a row; `stride` elements from one row to the next. A vector is [1, cols].
struct Tensor {
  void* data = nullptr;
  DType dtype = DType::kF32;
  int64_t rows = 0;
  int64_t cols = 0;
  int64_t stride = 0;

  // The elements as T, which must be the tensor's dtype.
  template <typename T>
  T* as() const {
    CHECK(DTypeOf<T>() == dtype);
    return static_cast<T*>(data);
  }
  template <typename T>
  T* row(int64_t i) const {
    return as<T>() + i * stride;
  }
  // Rows [begin, begin + count).
  Tensor Rows(int64_t begin, int64_t count) const {
    CHECK(begin >= 0 && count >= 0 && begin + count <= rows);
    return {static_cast<char*>(data) + begin * stride * DTypeBytes(dtype), dtype, count, cols, stride};
  }
  // Columns [begin, begin + count).
  Tensor Cols(int64_t begin, int64_t count) const {
    CHECK(begin >= 0 && count >= 0 && begin + count <= cols);
    return {static_cast<char*>(data) + begin * DTypeBytes(dtype), dtype, rows, count, stride};
  }
  int64_t bytes() const { return rows * cols * DTypeBytes(dtype); }
};

template <typename T>
Tensor MakeTensor(T* data, int64_t rows, int64_t cols) {
  return {const_cast<std::remove_const_t<T>*>(data), DTypeOf<T>(), rows, cols, cols};
}

}  // namespace soloist

#endif  // SOLOIST_KERNELS_TENSOR_H_
