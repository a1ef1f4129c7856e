// GrpcServer: the listening socket with InferenceService, ControlService, grpc.health.v1 and server reflection.
#ifndef SOLOIST_SERVER_GRPC_SERVER_H_
#define SOLOIST_SERVER_GRPC_SERVER_H_

#include <memory>
#include <string>

#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "server/frontend.h"

namespace soloist {

// All methods are for any thread.
class GrpcServer {
 public:
  // Listens at HOST:PORT (port 0: one that is free). Answers at once, whatever the front end's state. UNAVAILABLE: the
  // address cannot be used. `frontend` must outlive it.
  static absl::StatusOr<std::unique_ptr<GrpcServer>> Create(const std::string& address, Frontend& frontend);
  // Shutdown(0).
  virtual ~GrpcServer() = default;

  // HOST:PORT with the port in use.
  virtual const std::string& address() const = 0;
  // Accepts no more calls; those that are open after `grace` are cancelled. Returns when all have ended.
  virtual void Shutdown(absl::Duration grace) = 0;
};

}  // namespace soloist

#endif  // SOLOIST_SERVER_GRPC_SERVER_H_
