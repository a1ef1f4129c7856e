// Which way NCCL moves bytes: read from its log, since no call of NCCL tells.
#ifndef SOLOIST_ENGINE_COMM_NCCL_LOG_H_
#define SOLOIST_ENGINE_COMM_NCCL_LOG_H_

#include <cstdint>
#include <mutex>
#include <string>
#include <string_view>

namespace soloist {

struct NcclPaths {
  // The slowest kind of connection: "nvlink", "p2p", "ib", "net/NAME" (a network plug-in's name), "shm", "socket", from
  // fast to slow; empty if the log has no connection.
  std::string slowest;
  // "NET/Socket x 60, P2P/CUMEM x 4".
  std::string summary;
};
// `log`: lines that NCCL wrote with NCCL_DEBUG=INFO, NCCL_DEBUG_SUBSYS=INIT,GRAPH while it connected one rank.
NcclPaths ParseNcclLog(std::string_view log);

// NCCL's log of this process, kept in memory. Thread-safe.
class NcclLog {
 public:
  // The one of this process. The first call sets the environment variables NCCL_DEBUG=INFO,
  // NCCL_DEBUG_SUBSYS=INIT,GRAPH and NCCL_DEBUG_FILE, each where it is unset: it must come before the first call of
  // NCCL, and while no other thread reads the environment.
  static NcclLog& OfProcess();

  // Whether the log is here. Not so if the user has set NCCL_DEBUG_FILE.
  bool captured() const { return fd_ >= 0; }
  // Bytes written so far.
  int64_t size() const;
  // What was written from byte `from` on.
  std::string Since(int64_t from) const;
  // Writes what is new to stderr, if it was the user who wanted it (by NCCL_DEBUG).
  void Forward();

 private:
  NcclLog();

  int fd_ = -1;
  bool forward_ = false;
  std::mutex mutex_;
  int64_t forwarded_ = 0;
};

}  // namespace soloist

#endif  // SOLOIST_ENGINE_COMM_NCCL_LOG_H_
