#include "kernels/cuda/tuning_file.h"

#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <sstream>
#include <utility>

#include "base/status.h"
#include "nlohmann/json.hpp"
#include "spdlog/spdlog.h"

namespace soloist::cuda {
namespace {

constexpr int kFormat = 1;

using Json = nlohmann::json;

// The file's contents, in the shape that this format has; a fresh one if there is none or it is damaged.
Json Read(const std::string& path) {
  Json fresh = {{"format", kFormat}, {"sections", Json::object()}};
  std::ifstream file(path, std::ios::binary);
  if (!file) return fresh;
  std::stringstream text;
  text << file.rdbuf();
  Json root = Json::parse(text.str(), /*cb=*/nullptr, /*allow_exceptions=*/false);
  const char* fault = nullptr;
  if (root.is_discarded() || !root.is_object()) {
    fault = "is not a JSON object";
  } else if (!root.contains("format") || root["format"] != kFormat) {
    fault = "has another format";
  } else if (!root.contains("sections") || !root["sections"].is_object()) {
    fault = "has no sections";
  }
  if (fault != nullptr) {
    spdlog::warn("tuning file {} {}: ignored, to be rewritten", path, fault);
    return fresh;
  }
  return root;
}

absl::Status SystemError(const std::string& what, const std::string& path) {
  return Unavailable("tuning file: {} {}: {}", what, path, std::strerror(errno));
}

absl::Status WriteAll(int file, const std::string& text, const std::string& path) {
  size_t written = 0;
  while (written < text.size()) {
    const ssize_t count = write(file, text.data() + written, text.size() - written);
    if (count < 0 && errno == EINTR) continue;
    if (count < 0) return SystemError("writing", path);
    written += static_cast<size_t>(count);
  }
  if (fsync(file) != 0) return SystemError("syncing", path);
  return absl::OkStatus();
}

}  // namespace

TuningFile::TuningFile(std::string path, std::string section) : path_(std::move(path)), section_(std::move(section)) {
  if (path_.empty()) return;
  const Json root = Read(path_);
  const auto found = root["sections"].find(section_);
  if (found == root["sections"].end() || !found->is_object()) return;
  for (const auto& [key, value] : found->items()) {
    if (value.is_string()) values_[key] = value.get<std::string>();
  }
}

std::optional<std::string> TuningFile::Find(const std::string& key) const {
  const auto found = values_.find(key);
  if (found == values_.end()) return std::nullopt;
  return found->second;
}

void TuningFile::Set(const std::string& key, std::string value) {
  values_[key] = value;
  unsaved_[key] = std::move(value);
}

absl::Status TuningFile::Save() {
  if (path_.empty() || unsaved_.empty()) return absl::OkStatus();
  Json root = Read(path_);
  Json& section = root["sections"][section_];
  if (!section.is_object()) section = Json::object();
  for (const auto& [key, value] : unsaved_) section[key] = value;
  const std::string text = root.dump(1, ' ', /*ensure_ascii=*/false, Json::error_handler_t::replace) + "\n";

  std::string temporary = path_ + ".XXXXXX";
  const int file = mkstemp(temporary.data());
  if (file < 0) return SystemError("creating", temporary);
  absl::Status status = WriteAll(file, text, temporary);
  if (fchmod(file, 0644) != 0 && status.ok()) status = SystemError("changing the mode of", temporary);
  if (close(file) != 0 && status.ok()) status = SystemError("closing", temporary);
  if (status.ok() && std::rename(temporary.c_str(), path_.c_str()) != 0) status = SystemError("renaming to", path_);
  if (!status.ok()) {
    unlink(temporary.c_str());
    return status;
  }
  unsaved_.clear();
  return absl::OkStatus();
}

}  // namespace soloist::cuda
