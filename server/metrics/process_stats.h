// What the kernel says of this process.
#ifndef SOLOIST_SERVER_METRICS_PROCESS_STATS_H_
#define SOLOIST_SERVER_METRICS_PROCESS_STATS_H_

#include <cstdint>

namespace soloist {

struct ProcessStats {
  double cpu_s = 0;  // user and system
  int64_t resident_bytes = 0;
  int64_t open_files = 0;
};

// Reads /proc/self; what cannot be read is 0.
ProcessStats ReadProcessStats();

}  // namespace soloist

#endif  // SOLOIST_SERVER_METRICS_PROCESS_STATS_H_
