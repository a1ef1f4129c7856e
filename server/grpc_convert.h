// soloist.v1 messages from and to the server's own types. No state, no I/O.
#ifndef SOLOIST_SERVER_GRPC_CONVERT_H_
#define SOLOIST_SERVER_GRPC_CONVERT_H_

#include "absl/status/status.h"
#include "grpcpp/support/status.h"
#include "proto/soloist/v1/control.pb.h"
#include "proto/soloist/v1/inference.pb.h"
#include "server/frontend.h"
#include "server/generation.h"
#include "server/output_stream.h"

namespace soloist {

grpc::Status ToGrpc(const absl::Status& status);

// Checks nothing: Validate does.
GenerationRequest FromProto(const v1::GenerateRequest& request);
// `frontend` gives tokens their bytes and times their origin. `logprobs`: the request asked for them.
v1::GenerateResponse ToProto(const StreamEvent& event, bool logprobs, const Frontend& frontend);

v1::HealthResponse ToProto(const HealthReport& report);
// The engine's numbers, in the schema's words.
v1::GetLoadResponse LoadToProto(const LoadSnapshot& load, const Frontend& frontend);
v1::GetServerInfoResponse ServerInfoToProto(const Frontend& frontend);
v1::GetModelInfoResponse ModelInfoToProto(const Frontend& frontend);

}  // namespace soloist

#endif  // SOLOIST_SERVER_GRPC_CONVERT_H_
