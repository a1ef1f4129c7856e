// The load tester's gRPC client: soloist.v1.InferenceService.
#ifndef SOLOIST_CLI_LOADTEST_GRPC_CLIENT_H_
#define SOLOIST_CLI_LOADTEST_GRPC_CLIENT_H_

#include <memory>
#include <string>

#include "absl/status/statusor.h"
#include "cli/loadtest/load_client.h"

namespace soloist::cli {

class GrpcLoadClient : public LoadClient {
 public:
  // Asks the server what it is: fails within 10 s if nobody answers. Requests go over `connections` connections in
  // turn.
  static absl::StatusOr<std::unique_ptr<GrpcLoadClient>> Connect(const std::string& address, int connections);
};

}  // namespace soloist::cli

#endif  // SOLOIST_CLI_LOADTEST_GRPC_CLIENT_H_
