// The engine over workers that live in this process: a thread per rank that enqueues, and one that awaits where the
// device works on its own.
#ifndef SOLOIST_ENGINE_WORKER_RANK_THREADS_H_
#define SOLOIST_ENGINE_WORKER_RANK_THREADS_H_

#include <memory>
#include <vector>

#include "base/clock.h"
#include "engine/engine.h"
#include "engine/model/device_weights.h"
#include "engine/worker/worker.h"
#include "kernels/device.h"

namespace soloist {

// workers[r] is rank r's, warmed up; `factory` made their devices, `shared` are the weights that they all read. `clock`
// must outlive the engine.
std::unique_ptr<Engine> CreateRankThreads(EngineInfo info, std::unique_ptr<DeviceFactory> factory,
                                          std::unique_ptr<SharedWeights> shared,
                                          std::vector<std::unique_ptr<Worker>> workers, const Clock& clock);

}  // namespace soloist

#endif  // SOLOIST_ENGINE_WORKER_RANK_THREADS_H_
