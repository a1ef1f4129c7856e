// InProcessEngine: ranks are threads of this process. One rank is the default; 16 ranks own one expert per layer each
// and exchange tokens through shared memory, exactly as processes will.
#ifndef SOLOIST_ENGINE_WORKER_IN_PROCESS_ENGINE_H_
#define SOLOIST_ENGINE_WORKER_IN_PROCESS_ENGINE_H_

#include <cstdint>
#include <functional>
#include <memory>

#include "absl/status/statusor.h"
#include "base/clock.h"
#include "engine/engine.h"
#include "engine/worker/engine_options.h"

namespace soloist {

// Called now and then while loading, from the creating thread: bytes so far, of all.
using LoadCallback = std::function<void(int64_t loaded_bytes, int64_t total_bytes)>;

// Loads, warms up, starts the rank threads, is READY. Errors name the flag-like field or the file. `clock` must outlive
// the engine.
absl::StatusOr<std::unique_ptr<Engine>> CreateInProcessEngine(const EngineOptions& options, const Clock& clock,
                                                              const LoadCallback& on_progress);

}  // namespace soloist

#endif  // SOLOIST_ENGINE_WORKER_IN_PROCESS_ENGINE_H_
