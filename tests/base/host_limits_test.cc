// Limits of control groups, read from folders made for the test.
#include "base/host_limits.h"

#include <algorithm>
#include <cstdint>
#include <filesystem>
#include <fstream>
#include <map>
#include <string>

#include "gtest/gtest.h"

namespace soloist {
namespace {

constexpr int64_t kMiB = 1 << 20;
constexpr char kMemInfo[] = "MemTotal:       8388608 kB\nMemFree:  100 kB\nMemAvailable:    4194304 kB\nCached: 7 kB\n";

using Files = std::map<std::string, std::string>;

// A folder with these files in place of /.
class Root {
 public:
  explicit Root(const Files& files)
      : path_(std::filesystem::path(testing::TempDir()) / ("root" + std::to_string(++made_))) {
    for (const auto& [name, content] : files) {
      std::filesystem::create_directories((path_ / name).parent_path());
      std::ofstream(path_ / name) << content;
    }
  }
  ~Root() { std::filesystem::remove_all(path_); }
  Root(const Root&) = delete;
  Root& operator=(const Root&) = delete;
  std::string path() const { return path_.string(); }

 private:
  static inline int made_ = 0;
  const std::filesystem::path path_;
};

TEST(HostLimits, WithoutGroupsTheHostsOwn) {
  const Root root(Files{{"proc/meminfo", kMemInfo}});
  EXPECT_EQ(AvailableMemoryBytes(root.path()), 4096 * kMiB);
  EXPECT_GE(UsableCores(root.path()), 1);
  const Root unlimited(Files{{"proc/meminfo", kMemInfo},
                             {"proc/self/cgroup", "0::/\n"},
                             {"sys/fs/cgroup/memory.max", "max\n"},
                             {"sys/fs/cgroup/memory.current", "1000\n"},
                             {"sys/fs/cgroup/cpu.max", "max 100000\n"}});
  EXPECT_EQ(AvailableMemoryBytes(unlimited.path()), 4096 * kMiB);
  EXPECT_EQ(UsableCores(unlimited.path()), UsableCores(root.path()));
  EXPECT_EQ(AvailableMemoryBytes("/nowhere"), 0);
}

TEST(HostLimits, Version2TheTightestGroupOfAll) {
  const std::string outer = "sys/fs/cgroup/pods/", inner = outer + "worker/";
  Files files = {{"proc/meminfo", kMemInfo},
                 {"proc/self/cgroup", "0::/pods/worker\n"},
                 {inner + "memory.max", "max\n"},
                 {inner + "memory.current", std::to_string(300 * kMiB)},
                 {inner + "cpu.max", "max 100000\n"},
                 {outer + "memory.max", std::to_string(1024 * kMiB)},
                 {outer + "memory.current", std::to_string(600 * kMiB)},
                 {outer + "memory.stat", "anon 5\ninactive_file " + std::to_string(200 * kMiB) + "\nactive_file 9\n"},
                 {outer + "cpu.max", "50000 100000\n"}};
  EXPECT_EQ(AvailableMemoryBytes(Root(files).path()), (1024 - (600 - 200)) * kMiB);
  EXPECT_EQ(UsableCores(Root(files).path()), 1);
  files[inner + "memory.max"] = std::to_string(320 * kMiB);
  EXPECT_EQ(AvailableMemoryBytes(Root(files).path()), 20 * kMiB);
  files[inner + "memory.current"] = std::to_string(400 * kMiB);  // above it for a moment
  EXPECT_EQ(AvailableMemoryBytes(Root(files).path()), 0);
}

// A container's name for its group is the host's, but it sees its own limits at the top.
TEST(HostLimits, Version1InAContainer) {
  Files files = {
      {"proc/meminfo", kMemInfo},
      {"proc/self/cgroup", "5:cpu,cpuacct:/docker/af\n4:memory:/docker/af\n3:freezer:/docker/af\n0::/init\n"},
      {"sys/fs/cgroup/memory/memory.limit_in_bytes", std::to_string(2048 * kMiB)},
      {"sys/fs/cgroup/memory/memory.usage_in_bytes", std::to_string(1500 * kMiB)},
      {"sys/fs/cgroup/memory/memory.stat", "cache 1\ntotal_inactive_file " + std::to_string(500 * kMiB) + "\n"},
      {"sys/fs/cgroup/cpu/cpu.cfs_quota_us", "-1\n"},
      {"sys/fs/cgroup/cpu/cpu.cfs_period_us", "100000\n"}};
  EXPECT_EQ(AvailableMemoryBytes(Root(files).path()), 1048 * kMiB);
  const int all = UsableCores(Root(files).path());
  files["sys/fs/cgroup/cpu/cpu.cfs_quota_us"] = "20000\n";
  EXPECT_EQ(UsableCores(Root(files).path()), 1);
  files["sys/fs/cgroup/cpu/cpu.cfs_quota_us"] = "110000\n";  // rounded up
  EXPECT_EQ(UsableCores(Root(files).path()), std::min(all, 2));
  // The limit of a group without one.
  files["sys/fs/cgroup/memory/memory.limit_in_bytes"] = "9223372036854771712\n";
  EXPECT_EQ(AvailableMemoryBytes(Root(files).path()), 4096 * kMiB);
}

}  // namespace
}  // namespace soloist
