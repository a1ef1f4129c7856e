#include "engine/model/safetensors.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <utility>

#include "base/status.h"
#include "engine/model/json_fields.h"

namespace soloist {
namespace {

constexpr int64_t kLengthBytes = 8;
constexpr int64_t kMaxHeaderBytes = 100'000'000;  // the format's own limit

// Bytes per element; 0: unknown to the format.
int64_t TypeBytes(std::string_view name) {
  static constexpr std::pair<std::string_view, int64_t> kTypes[] = {
      {"BF16", 2}, {"F16", 2}, {"F32", 4}, {"F64", 8}, {"I64", 8},     {"I32", 4},     {"I16", 2}, {"I8", 1},
      {"U64", 8},  {"U32", 4}, {"U16", 2}, {"U8", 1},  {"F8_E4M3", 1}, {"F8_E5M2", 1}, {"BOOL", 1}};
  for (const auto& [type, bytes] : kTypes) {
    if (type == name) return bytes;
  }
  return 0;
}

StoredType TypeOf(std::string_view name) {
  return name == "BF16"  ? StoredType::kBF16
         : name == "F16" ? StoredType::kF16
         : name == "F32" ? StoredType::kF32
                         : StoredType::kOther;
}

// A non-negative integer below 2^62.
bool GetSize(const nlohmann::json& value, int64_t& out) {
  if (!value.is_number_unsigned() || value.get<uint64_t>() >= (uint64_t{1} << 62)) return false;
  out = value.get<int64_t>();
  return true;
}

absl::StatusOr<StoredTensor> ParseTensor(const nlohmann::json& entry, const std::string& where, int64_t data_begin,
                                         int64_t data_bytes) {
  if (!entry.is_object()) return InvalidArgument("{}: an object is expected, found {}", where, entry.type_name());
  const auto dtype = entry.find("dtype"), shape = entry.find("shape"), offsets = entry.find("data_offsets");
  if (dtype == entry.end() || !dtype->is_string())
    return InvalidArgument("{}: dtype is missing or not a string", where);
  if (shape == entry.end() || !shape->is_array()) return InvalidArgument("{}: shape is missing or not a list", where);
  if (offsets == entry.end() || !offsets->is_array() || offsets->size() != 2) {
    return InvalidArgument("{}: data_offsets is missing or not a list of two", where);
  }
  StoredTensor tensor;
  tensor.type_name = dtype->get<std::string>();
  tensor.type = TypeOf(tensor.type_name);
  int64_t bytes = TypeBytes(tensor.type_name);
  if (bytes == 0) return InvalidArgument("{}: dtype is '{}', unknown to the format", where, tensor.type_name);
  for (const nlohmann::json& dim : *shape) {
    int64_t size = 0;
    if (!GetSize(dim, size)) return InvalidArgument("{}: shape holds {}, expected sizes", where, dim.dump());
    tensor.shape.push_back(size);
    if (__builtin_mul_overflow(bytes, size, &bytes))
      return InvalidArgument("{}: shape {} overflows", where, shape->dump());
  }
  int64_t begin = 0, end = 0;
  if (!GetSize((*offsets)[0], begin) || !GetSize((*offsets)[1], end) || begin > end) {
    return InvalidArgument("{}: data_offsets are {}, expected begin <= end", where, offsets->dump());
  }
  if (end > data_bytes) {
    return InvalidArgument("{}: data_offsets end at {}, but the file holds {} bytes of data", where, end, data_bytes);
  }
  if (end - begin != bytes) {
    return InvalidArgument("{}: data_offsets span {} bytes, but {} {} needs {}", where, end - begin, tensor.type_name,
                           shape->dump(), bytes);
  }
  tensor.begin = data_begin + begin;
  tensor.bytes = bytes;
  return tensor;
}

}  // namespace

absl::StatusOr<StoredTensors> ParseSafetensorsHeader(std::string_view bytes, int64_t file_size,
                                                     std::string_view source_name) {
  if (file_size < kLengthBytes || bytes.size() < kLengthBytes) {
    return InvalidArgument("{}: {} bytes, a safetensors file has at least {}", source_name, file_size, kLengthBytes);
  }
  uint64_t length = 0;
  std::memcpy(&length, bytes.data(), kLengthBytes);
  if (length > static_cast<uint64_t>(std::min(kMaxHeaderBytes, file_size - kLengthBytes)) ||
      length > bytes.size() - kLengthBytes) {
    return InvalidArgument("{}: the header claims {} bytes, the file has {} (limit {})", source_name, length, file_size,
                           kMaxHeaderBytes);
  }
  auto header = ParseJsonObject(bytes.substr(kLengthBytes, length), fmt::format("{} header", source_name));
  if (!header.ok()) return header.status();
  const int64_t data_begin = kLengthBytes + static_cast<int64_t>(length), data_bytes = file_size - data_begin;
  StoredTensors tensors;
  for (const auto& [name, entry] : header->items()) {
    if (name == "__metadata__") continue;
    ASSIGN_OR_RETURN(StoredTensor tensor,
                     ParseTensor(entry, fmt::format("{}: tensor '{}'", source_name, name), data_begin, data_bytes));
    tensors.emplace(name, std::move(tensor));
  }
  std::vector<std::pair<const StoredTensor*, const std::string*>> order;
  for (const auto& [name, tensor] : tensors) order.push_back({&tensor, &name});
  std::sort(order.begin(), order.end(), [](const auto& a, const auto& b) {
    return std::pair(a.first->begin, a.first->bytes) < std::pair(b.first->begin, b.first->bytes);
  });
  int64_t at = data_begin;
  for (const auto& [tensor, name] : order) {
    if (tensor->begin != at) {
      return InvalidArgument("{}: tensor '{}' begins at byte {}, expected {}: {}", source_name, *name, tensor->begin,
                             at, tensor->begin < at ? "it overlaps another" : "there is a hole");
    }
    at += tensor->bytes;
  }
  if (at != file_size) {
    return InvalidArgument("{}: tensors end at byte {}, the file at {}", source_name, at, file_size);
  }
  return tensors;
}

absl::StatusOr<std::unique_ptr<const SafetensorsFile>> SafetensorsFile::Open(const std::string& path) {
  const int fd = open(path.c_str(), O_RDONLY | O_CLOEXEC);
  if (fd < 0) return NotFound("{}: {}", path, std::strerror(errno));
  struct stat info = {};
  if (fstat(fd, &info) != 0 || !S_ISREG(info.st_mode)) {
    close(fd);
    return InvalidArgument("{}: not a regular file", path);
  }
  std::unique_ptr<SafetensorsFile> file(new SafetensorsFile);
  file->path_ = path;
  file->size_ = info.st_size;
  if (file->size_ < kLengthBytes) {
    close(fd);
    return InvalidArgument("{}: {} bytes, a safetensors file has at least {}", path, file->size_, kLengthBytes);
  }
  void* data = mmap(nullptr, file->size_, PROT_READ, MAP_SHARED, fd, 0);
  close(fd);
  if (data == MAP_FAILED) return ResourceExhausted("{}: mapping {} bytes: {}", path, file->size_, std::strerror(errno));
  file->data_ = static_cast<const char*>(data);
  ASSIGN_OR_RETURN(file->tensors_,
                   ParseSafetensorsHeader(std::string_view(file->data_, file->size_), file->size_, path));
  return file;
}

SafetensorsFile::~SafetensorsFile() {
  if (data_ != nullptr) munmap(const_cast<char*>(data_), size_);
}

void SafetensorsFile::WillNeed(int64_t begin, int64_t size) const {
  const int64_t page = sysconf(_SC_PAGESIZE), first = begin / page * page;
  madvise(const_cast<char*>(data_) + first, std::min(size_, begin + size) - first, MADV_WILLNEED);
}

}  // namespace soloist
