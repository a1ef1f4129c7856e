// What this process may use of its host: what the host has, or less where a control group (version 2 or 1: a
// container's limits) says so. Read anew at each call.
#ifndef SOLOIST_BASE_HOST_LIMITS_H_
#define SOLOIST_BASE_HOST_LIMITS_H_

#include <cstdint>
#include <string>

namespace soloist {

// `root`: the folder that holds proc and sys; tests have their own.

// Cores that the calling thread may run on, or the quota of CPU time rounded up to whole cores; at least 1.
int UsableCores(const std::string& root = "/");

// Memory that may still be used before the host or a group is short of it: free, and the page cache that is given back
// when asked for. 0 if the host does not say.
int64_t AvailableMemoryBytes(const std::string& root = "/");

}  // namespace soloist

#endif  // SOLOIST_BASE_HOST_LIMITS_H_
