// The communicator of a rank that has no group: while it loads, and between two incarnations of the group.
#ifndef SOLOIST_ENGINE_CLUSTER_ABSENT_COMMUNICATOR_H_
#define SOLOIST_ENGINE_CLUSTER_ABSENT_COMMUNICATOR_H_

#include <memory>

#include "engine/comm/communicator.h"

namespace soloist {

// Says its rank and size; every collective returns UNAVAILABLE.
std::unique_ptr<Communicator> CreateAbsentCommunicator(int rank, int size);

}  // namespace soloist

#endif  // SOLOIST_ENGINE_CLUSTER_ABSENT_COMMUNICATOR_H_
