#include "base/host_limits.h"

#include <sched.h>

#include <algorithm>
#include <filesystem>
#include <fstream>
#include <functional>
#include <optional>
#include <sstream>
#include <string_view>

namespace soloist {
namespace {

namespace fs = std::filesystem;

// The file's first number; none if there is no such file, or it says "max".
std::optional<int64_t> NumberIn(const fs::path& file) {
  int64_t number = 0;
  if (std::ifstream(file) >> number) return number;
  return std::nullopt;
}

// Of a file with a name and a number in each line: 0 if there is no such name.
int64_t NumberOf(const fs::path& file, std::string_view wanted) {
  std::ifstream in(file);
  std::string name, rest;
  for (int64_t number = 0; in >> name >> number; std::getline(in, rest)) {
    if (name == wanted) return number;
  }
  return 0;
}

// Calls `visit` with the folder of the process's group and of every group around it: each has its own limits. A
// container may see its own group as the outermost, whatever its name is outside. `controller`: memory or cpu; version
// 2 has one hierarchy for all.
void ForGroups(const fs::path& root, std::string_view controller,
               const std::function<void(const fs::path& folder, bool version_2)>& visit) {
  std::ifstream groups(root / "proc/self/cgroup");
  // ID:CONTROLLER,CONTROLLER:/PATH, in version 2 "0::/PATH".
  for (std::string line; std::getline(groups, line);) {
    const size_t first = line.find(':'), second = line.find(':', first + 1);
    if (first == std::string::npos || second == std::string::npos) continue;
    std::istringstream controllers(line.substr(first + 1, second - first - 1));
    const bool version_2 = second == first + 1;
    bool found = version_2;
    for (std::string name; std::getline(controllers, name, ',');) found = found || name == controller;
    if (!found) continue;
    const fs::path top = version_2 ? root / "sys/fs/cgroup" : root / "sys/fs/cgroup" / controller;
    for (fs::path path = fs::path(line.substr(second + 1)).relative_path();; path = path.parent_path()) {
      visit(top / path, version_2);
      if (path.empty()) break;
    }
  }
}

}  // namespace

int UsableCores(const std::string& root) {
  cpu_set_t set;
  int cores = sched_getaffinity(0, sizeof(set), &set) == 0 ? CPU_COUNT(&set) : 1;
  ForGroups(root, "cpu", [&](const fs::path& folder, bool version_2) {
    int64_t quota_us = 0, period_us = 0;
    if (version_2) {
      std::ifstream file(folder / "cpu.max");
      if (!(file >> quota_us >> period_us)) return;
    } else {
      quota_us = NumberIn(folder / "cpu.cfs_quota_us").value_or(-1);
      period_us = NumberIn(folder / "cpu.cfs_period_us").value_or(0);
    }
    if (quota_us <= 0 || period_us <= 0) return;
    cores = static_cast<int>(std::min<int64_t>(cores, (quota_us + period_us - 1) / period_us));
  });
  return std::max(1, cores);
}

int64_t AvailableMemoryBytes(const std::string& root) {
  int64_t available = NumberOf(fs::path(root) / "proc/meminfo", "MemAvailable:") * 1024;
  ForGroups(root, "memory", [&](const fs::path& folder, bool version_2) {
    const auto limit = NumberIn(folder / (version_2 ? "memory.max" : "memory.limit_in_bytes"));
    const auto used = NumberIn(folder / (version_2 ? "memory.current" : "memory.usage_in_bytes"));
    if (!limit.has_value() || !used.has_value()) return;
    const int64_t cache = NumberOf(folder / "memory.stat", version_2 ? "inactive_file" : "total_inactive_file");
    available = std::min(available, std::max<int64_t>(0, *limit - (*used - std::min(cache, *used))));
  });
  return available;
}

}  // namespace soloist
