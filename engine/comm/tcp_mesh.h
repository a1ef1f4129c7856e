// How the ranks of a communicator connect: every pair has two TCP connections, one for what collectives move and one
// for control (group_control.h). Private to engine/comm.
//
// Each rank listens on one port, publishes address and a random token in the BootstrapStore, dials the ranks below it
// and is dialled by those above. Whoever dials shows the token: a stranger, or a rank of an older incarnation, that
// reaches the port is turned away and disturbs nobody.
#ifndef SOLOIST_ENGINE_COMM_TCP_MESH_H_
#define SOLOIST_ENGINE_COMM_TCP_MESH_H_

#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "engine/comm/bootstrap.h"
#include "engine/comm/tcp_socket.h"

namespace soloist {

struct MeshOptions {
  std::string host;       // what peers dial; empty: the address that is listened on
  std::string interface;  // see ListenAddress
  int port_begin = 0;     // see Listen
  int port_end = 0;
  std::string settings;  // no spaces; must be the same on all ranks
  absl::Duration timeout = absl::Seconds(30);
};

struct Mesh {
  std::vector<Socket> data;     // [size]; the own one is not valid
  std::vector<Socket> control;  // [size]
  std::string listen_address;   // numeric
};

// Returns when this rank is connected to all. DEADLINE_EXCEEDED names the ranks that are missing, UNAVAILABLE one that
// published its address and has gone, FAILED_PRECONDITION one with other settings; errors of the store, which are seen
// soon at any time, and of Listen.
absl::StatusOr<Mesh> ConnectMesh(int rank, int size, BootstrapStore& store, const MeshOptions& options);

}  // namespace soloist

#endif  // SOLOIST_ENGINE_COMM_TCP_MESH_H_
