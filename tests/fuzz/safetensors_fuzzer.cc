// Bytes from anywhere as a safetensors file: what is accepted lies inside the file, without overlap, in the right size.
#include <algorithm>
#include <cstdint>
#include <string_view>
#include <utility>
#include <vector>

#include "base/check.h"
#include "engine/model/safetensors.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  const std::string_view bytes(reinterpret_cast<const char*>(data), size);
  const auto tensors = soloist::ParseSafetensorsHeader(bytes, static_cast<int64_t>(size), "fuzz");
  if (!tensors.ok()) return 0;
  std::vector<std::pair<int64_t, int64_t>> ranges;
  for (const auto& [name, tensor] : *tensors) {
    CHECK(tensor.begin >= 8 && tensor.bytes >= 0 && tensor.begin + tensor.bytes <= static_cast<int64_t>(size));
    int64_t elements = 1;
    for (const int64_t n : tensor.shape) {
      CHECK(n >= 0);
      elements *= n;
    }
    if (tensor.type != soloist::StoredType::kOther) {
      CHECK_EQ(tensor.bytes, elements * (tensor.type == soloist::StoredType::kF32 ? 4 : 2));
    }
    if (tensor.bytes > 0) ranges.emplace_back(tensor.begin, tensor.begin + tensor.bytes);
  }
  std::ranges::sort(ranges);
  for (size_t i = 1; i < ranges.size(); ++i) CHECK(ranges[i - 1].second <= ranges[i].first);
  return 0;
}
