// What the tests of the step loop share: a small simulated engine, and requests with their sinks.
#ifndef SOLOIST_TESTS_SCHEDULER_STEP_LOOP_TESTING_H_
#define SOLOIST_TESTS_SCHEDULER_STEP_LOOP_TESTING_H_

#include <memory>

#include "tests/scheduler/testing.h"

namespace soloist {

inline SimulatedOptions Simulated(int homes) {
  SimulatedOptions options;
  options.num_homes = homes;
  options.limits = TestLimits(24, 4);
  return options;
}

// Integrity is checked whenever nothing runs; token 3 ends an output.
inline SchedulerOptions Checked() {
  SchedulerOptions options;
  options.check_integrity_when_idle = true;
  options.eos_token_ids = {3};
  return options;
}

// A request with the sink that takes its answer; `accept`: as RecordingSink's.
struct Asked {
  Request request;
  std::shared_ptr<RecordingSink> sink;
};

inline Asked Ask(const Request& request, int accept = -1) {
  auto sink = std::make_shared<RecordingSink>(request.num_outputs, accept);
  Asked asked{request, sink};
  asked.request.sink = sink;
  return asked;
}

}  // namespace soloist

#endif  // SOLOIST_TESTS_SCHEDULER_STEP_LOOP_TESTING_H_
