// CommOp: which collective a rank is in, for checks between ranks and for messages. Private to engine/comm.
#ifndef SOLOIST_ENGINE_COMM_COMM_OP_H_
#define SOLOIST_ENGINE_COMM_COMM_OP_H_

namespace soloist {

// The values travel between hosts.
enum class CommOp : int { kNone, kAllToAll, kAllToAllV, kAllReduceSum, kAllGather, kBroadcast, kBarrier, kSend, kRecv };

// "AllToAll".
const char* CommOpName(CommOp op);

}  // namespace soloist

#endif  // SOLOIST_ENGINE_COMM_COMM_OP_H_
