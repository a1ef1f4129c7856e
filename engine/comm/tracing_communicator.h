// A communicator that notes when each of its calls begins and ends, for devices whose streams run each call to its end.
#ifndef SOLOIST_ENGINE_COMM_TRACING_COMMUNICATOR_H_
#define SOLOIST_ENGINE_COMM_TRACING_COMMUNICATOR_H_

#include <memory>

#include "engine/comm/communicator.h"
#include "engine/trace.h"

namespace soloist {

// `trace` must outlive it; its step is the calls'.
std::unique_ptr<Communicator> CreateTracingCommunicator(std::unique_ptr<Communicator> comm, const RankTrace& trace);

}  // namespace soloist

#endif  // SOLOIST_ENGINE_COMM_TRACING_COMMUNICATOR_H_
