#include "engine/cluster/fingerprint.h"

#include <algorithm>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <system_error>
#include <vector>

#include "base/status.h"

namespace soloist {
namespace {

constexpr uint64_t kPrime = 0x100000001b3u;
// More than any header of a real checkpoint.
constexpr uint64_t kMaxHeaderBytes = 256 << 20;

absl::StatusOr<std::string> ReadStart(const std::filesystem::path& path, int64_t bytes) {
  std::ifstream file(path, std::ios::binary);
  std::string text(static_cast<size_t>(bytes), '\0');
  if (!file || !file.read(text.data(), bytes)) return NotFound("cannot read {} bytes of '{}'", bytes, path.string());
  return text;
}

absl::StatusOr<int64_t> SizeOf(const std::filesystem::path& path) {
  std::error_code error;
  const auto size = std::filesystem::file_size(path, error);
  if (error) return NotFound("cannot read '{}': {}", path.string(), error.message());
  return static_cast<int64_t>(size);
}

absl::StatusOr<std::string> FileFingerprint(const std::filesystem::path& path) {
  std::ifstream file(path, std::ios::binary);
  if (!file) return NotFound("cannot read '{}'", path.string());
  Fingerprint fingerprint;
  std::string block(1 << 20, '\0');
  while (file.read(block.data(), std::ssize(block)) || file.gcount() > 0) {
    fingerprint.Add(std::string_view(block).substr(0, static_cast<size_t>(file.gcount())));
  }
  return fingerprint.Hex();
}

}  // namespace

void Fingerprint::Add(std::string_view bytes) {
  // Eight bytes at a time: a byte at a time would be the slowest part of a worker's start.
  size_t i = 0;
  for (; i + 8 <= bytes.size(); i += 8) {
    uint64_t word = 0;
    std::memcpy(&word, bytes.data() + i, 8);
    state_ = (state_ ^ word) * kPrime;
    state_ ^= state_ >> 32;
  }
  for (; i < bytes.size(); ++i) state_ = (state_ ^ static_cast<uint8_t>(bytes[i])) * kPrime;
  Add(static_cast<int64_t>(bytes.size()));
}

void Fingerprint::Add(int64_t number) {
  state_ = (state_ ^ static_cast<uint64_t>(number)) * kPrime;
  state_ ^= state_ >> 32;
}

std::string Fingerprint::Hex() const { return fmt::format("{:016x}", state_); }

absl::StatusOr<std::string> ExecutableFingerprint() { return FileFingerprint("/proc/self/exe"); }

absl::StatusOr<std::string> ConfigFingerprint(const std::string& model_dir) {
  return FileFingerprint(std::filesystem::path(model_dir) / "config.json");
}

absl::StatusOr<std::string> CheckpointFingerprint(const std::string& model_dir) {
  std::vector<std::filesystem::path> files;
  std::error_code error;
  for (const auto& entry : std::filesystem::directory_iterator(model_dir, error)) {
    if (entry.path().extension() == ".safetensors") files.push_back(entry.path());
  }
  if (error) return NotFound("cannot read '{}': {}", model_dir, error.message());
  if (files.empty()) return NotFound("no .safetensors file in '{}'", model_dir);
  std::ranges::sort(files);
  Fingerprint fingerprint;
  for (const auto& path : files) {
    ASSIGN_OR_RETURN(const int64_t size, SizeOf(path));
    ASSIGN_OR_RETURN(const std::string length, ReadStart(path, 8));
    uint64_t header_bytes = 0;
    std::memcpy(&header_bytes, length.data(), 8);
    if (header_bytes > kMaxHeaderBytes || static_cast<int64_t>(header_bytes) + 8 > size) {
      return InvalidArgument("'{}' is no safetensors file: a header of {} bytes, a file of {}", path.string(),
                             header_bytes, size);
    }
    ASSIGN_OR_RETURN(const std::string header, ReadStart(path, 8 + static_cast<int64_t>(header_bytes)));
    fingerprint.Add(path.filename().string());
    fingerprint.Add(size);
    fingerprint.Add(header);
  }
  return fingerprint.Hex();
}

}  // namespace soloist
