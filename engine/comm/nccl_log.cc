#include "engine/comm/nccl_log.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cstdio>
#include <cstdlib>
#include <map>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"

namespace soloist {
namespace {

// From fast to slow; a network of another name goes behind "ib".
constexpr std::array<std::string_view, 6> kKinds = {"nvlink", "p2p", "ib", "net/", "shm", "socket"};

size_t Slowness(std::string_view kind) {
  for (size_t i = 0; i < kKinds.size(); ++i) {
    if (kind == kKinds[i] || (kKinds[i] == "net/" && kind.starts_with("net/"))) return i;
  }
  return kKinds.size();
}

// `path` is "NET/Socket", "P2P/CUMEM", "SHM/direct".
std::string KindOf(std::string_view path, bool nvlink) {
  if (path.starts_with("P2P/")) return nvlink ? "nvlink" : "p2p";
  if (path.starts_with("SHM/")) return "shm";
  if (path == "NET/Socket") return "socket";
  if (path.starts_with("NET/IB")) return "ib";
  if (path.starts_with("NET/")) return absl::StrCat("net/", std::string(path.substr(4)));
  return std::string(path);
}

}  // namespace

// Lines such as
//   host:9:17 [0] NCCL INFO Channel 00/0 : 0[0] -> 1[1] via P2P/CUMEM/read
//   host:9:17 [0] NCCL INFO Channel 01/1 : 3[0] -> 0[0] [receive] via NET/IB/0/GDRDMA
//   host:9:17 [0] NCCL INFO Pattern 4, crossNic 0, nChannels 12, bw 20.0/20.0, type NVL/PIX, sameChannels 1
// Peers within a node are connected as "P2P" over NVLink and over PCIe alike; the ring (pattern 4) tells by the slowest
// hop within the node, which is the first of the two types.
NcclPaths ParseNcclLog(std::string_view log) {
  constexpr std::string_view kVia = " via ", kType = " type ";
  std::map<std::string, int> paths;
  bool ring = false, nvlink = true;
  for (const absl::string_view text : absl::StrSplit(absl::string_view(log.data(), log.size()), '\n')) {
    const std::string_view line(text.data(), text.size());
    if (const size_t at = line.find(kType); at != line.npos && line.find("Pattern 4,") != line.npos) {
      const std::string_view type = line.substr(at + kType.size(), 3);
      ring = true;
      nvlink = nvlink && (type == "NVL" || type == "NVB");
    }
    const size_t via = line.find(kVia);
    if (via == line.npos || line.find("Channel ") > via) continue;
    std::string_view path = line.substr(via + kVia.size());
    const size_t slash = path.find('/');
    if (slash == path.npos) continue;
    path = path.substr(0, path.find('/', slash + 1));
    ++paths[std::string(path)];
  }
  NcclPaths out;
  for (const auto& [path, count] : paths) {
    absl::StrAppend(&out.summary, out.summary.empty() ? "" : ", ", path, " x ", count);
    std::string kind = KindOf(path, ring && nvlink);
    if (out.slowest.empty() || Slowness(kind) > Slowness(out.slowest)) out.slowest = std::move(kind);
  }
  return out;
}

NcclLog& NcclLog::OfProcess() {
  static NcclLog& log = *new NcclLog;
  return log;
}

// NCCL opens NCCL_DEBUG_FILE by its name. A name of a file in memory needs no folder to write to, and leaves nothing.
NcclLog::NcclLog() {
  if (std::getenv("NCCL_DEBUG_FILE") != nullptr) return;
  const int fd = memfd_create("nccl-log", MFD_CLOEXEC);
  if (fd < 0) return;
  const std::string name = absl::StrCat("/proc/self/fd/", fd);
  // Without /proc NCCL would write to stdout instead.
  const int again = open(name.c_str(), O_WRONLY | O_CLOEXEC);
  if (again < 0) {
    close(fd);
    return;
  }
  close(again);
  fd_ = fd;
  forward_ = std::getenv("NCCL_DEBUG") != nullptr;
  setenv("NCCL_DEBUG", "INFO", 0);
  setenv("NCCL_DEBUG_SUBSYS", forward_ ? "INIT,BOOTSTRAP,ENV,GRAPH" : "INIT,GRAPH", 0);
  setenv("NCCL_DEBUG_FILE", name.c_str(), 0);
}

int64_t NcclLog::size() const {
  struct stat status;
  return captured() && fstat(fd_, &status) == 0 ? status.st_size : 0;
}

std::string NcclLog::Since(int64_t from) const {
  std::string out(static_cast<size_t>(std::max<int64_t>(size() - from, 0)), '\0');
  size_t have = 0;
  while (have < out.size()) {
    const ssize_t got = pread(fd_, out.data() + have, out.size() - have, from + static_cast<int64_t>(have));
    if (got <= 0) break;
    have += static_cast<size_t>(got);
  }
  out.resize(have);
  return out;
}

void NcclLog::Forward() {
  if (!forward_) return;
  const std::lock_guard lock(mutex_);
  const std::string text = Since(forwarded_);
  forwarded_ += static_cast<int64_t>(text.size());
  std::fwrite(text.data(), 1, text.size(), stderr);
}

}  // namespace soloist
