// What the scheduler tells of its load and of its homes' times.
#include <algorithm>
#include <memory>
#include <utility>

#include "scheduler/scheduler.h"

namespace soloist {

void Scheduler::CountTimes(int32_t home, const HomeResult& result) {
  LoadSnapshot::Times& times = totals_.times[home];
  times.device_ns += result.device_ns;
  times.idle_ns += result.idle_ns;
  times.enqueue_ns += result.enqueue_ns;
  times.comm_ns += result.comm_ns;
  times.comm_wait_ns += result.comm_wait_ns;
  if (result.groups.empty()) return;
  // Snapshots share it, so that the steps that are not profiled copy nothing.
  auto profile = times.profile == nullptr ? std::make_shared<LoadSnapshot::Profile>()
                                          : std::make_shared<LoadSnapshot::Profile>(*times.profile);
  ++profile->steps;
  for (const GroupTime& time : result.groups) {
    const auto group = std::ranges::find(profile->groups, time.group, &GroupTime::group);
    if (group == profile->groups.end()) {
      profile->groups.push_back(time);
    } else {
      group->ns += time.ns;
    }
  }
  times.profile = std::move(profile);
}

LoadSnapshot Scheduler::Load() const {
  LoadSnapshot load = totals_;
  for (const Home& home : homes_) {
    load.homes.push_back({.running_sequences = static_cast<int32_t>(home.running.size()),
                          .waiting_sequences = static_cast<int32_t>(home.waiting.size()),
                          .total_blocks = home.usable ? home.pool.total() : 0,
                          .used_blocks = home.pool.used(),
                          .cached_blocks = home.pool.cached()});
  }
  load.running_requests = num_requests() - load.waiting_requests;
  return load;
}

}  // namespace soloist
