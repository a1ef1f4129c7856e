// A safetensors file, mapped read-only and checked: https://github.com/huggingface/safetensors (8 bytes of header
// length, little endian; a JSON header; the data, without holes).
#ifndef SOLOIST_ENGINE_MODEL_SAFETENSORS_H_
#define SOLOIST_ENGINE_MODEL_SAFETENSORS_H_

#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"

namespace soloist {

enum class StoredType { kBF16, kF16, kF32, kOther };

struct StoredTensor {
  StoredType type = StoredType::kOther;
  std::string type_name;  // as in the file
  std::vector<int64_t> shape;
  int64_t begin = 0;  // bytes from the file's start
  int64_t bytes = 0;
};

using StoredTensors = std::map<std::string, StoredTensor, std::less<>>;

// The header of a file of `file_size` bytes that begins with `bytes` (at least the header). INVALID_ARGUMENT names
// source, tensor, what was found and what was expected: sizes that disagree with shape and dtype, overlaps, holes, an
// end that is not the file's.
absl::StatusOr<StoredTensors> ParseSafetensorsHeader(std::string_view bytes, int64_t file_size,
                                                     std::string_view source_name);

// Thread-safe. The mapping lives as long as the object.
class SafetensorsFile {
 public:
  static absl::StatusOr<std::unique_ptr<const SafetensorsFile>> Open(const std::string& path);
  ~SafetensorsFile();
  SafetensorsFile(const SafetensorsFile&) = delete;
  SafetensorsFile& operator=(const SafetensorsFile&) = delete;

  const std::string& path() const { return path_; }
  const StoredTensors& tensors() const { return tensors_; }
  // Bytes [begin, begin + size) of the file.
  const char* Data(int64_t begin) const { return data_ + begin; }
  // Tells the kernel that these bytes are needed soon.
  void WillNeed(int64_t begin, int64_t size) const;

 private:
  SafetensorsFile() = default;
  std::string path_;
  StoredTensors tensors_;
  const char* data_ = nullptr;
  int64_t size_ = 0;
};

}  // namespace soloist

#endif  // SOLOIST_ENGINE_MODEL_SAFETENSORS_H_
