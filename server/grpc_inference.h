// soloist.v1.InferenceService over a Frontend. Callback API: no thread of its own.
#ifndef SOLOIST_SERVER_GRPC_INFERENCE_H_
#define SOLOIST_SERVER_GRPC_INFERENCE_H_

#include <memory>

#include "grpcpp/support/server_callback.h"
#include "proto/soloist/v1/inference.grpc.pb.h"
#include "server/frontend.h"

namespace soloist {

// `frontend` must outlive the gRPC server that the service is registered with.
class InferenceService final : public v1::InferenceService::CallbackService {
 public:
  explicit InferenceService(Frontend& frontend) : frontend_(frontend) {}

  grpc::ServerWriteReactor<v1::GenerateResponse>* Generate(grpc::CallbackServerContext* context,
                                                           const v1::GenerateRequest* request) override;
  grpc::ServerUnaryReactor* Abort(grpc::CallbackServerContext* context, const v1::AbortRequest* request,
                                  v1::AbortResponse* response) override;
  grpc::ServerUnaryReactor* Tokenize(grpc::CallbackServerContext* context, const v1::TokenizeRequest* request,
                                     v1::TokenizeResponse* response) override;
  grpc::ServerUnaryReactor* Detokenize(grpc::CallbackServerContext* context, const v1::DetokenizeRequest* request,
                                       v1::DetokenizeResponse* response) override;

 private:
  Frontend& frontend_;
};

}  // namespace soloist

#endif  // SOLOIST_SERVER_GRPC_INFERENCE_H_
