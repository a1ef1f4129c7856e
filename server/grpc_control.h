// soloist.v1.ControlService over a Frontend.
#ifndef SOLOIST_SERVER_GRPC_CONTROL_H_
#define SOLOIST_SERVER_GRPC_CONTROL_H_

#include "grpcpp/support/server_callback.h"
#include "proto/soloist/v1/control.grpc.pb.h"
#include "server/frontend.h"

namespace soloist {

// `frontend` must outlive the gRPC server that the service is registered with.
class ControlService final : public v1::ControlService::CallbackService {
 public:
  explicit ControlService(Frontend& frontend) : frontend_(frontend) {}

  grpc::ServerUnaryReactor* GetServerInfo(grpc::CallbackServerContext* context, const v1::GetServerInfoRequest* request,
                                          v1::GetServerInfoResponse* response) override;
  grpc::ServerUnaryReactor* GetModelInfo(grpc::CallbackServerContext* context, const v1::GetModelInfoRequest* request,
                                         v1::GetModelInfoResponse* response) override;
  grpc::ServerUnaryReactor* GetLoad(grpc::CallbackServerContext* context, const v1::GetLoadRequest* request,
                                    v1::GetLoadResponse* response) override;
  grpc::ServerUnaryReactor* Health(grpc::CallbackServerContext* context, const v1::HealthRequest* request,
                                   v1::HealthResponse* response) override;
  grpc::ServerUnaryReactor* Drain(grpc::CallbackServerContext* context, const v1::DrainRequest* request,
                                  v1::DrainResponse* response) override;

 private:
  Frontend& frontend_;
};

}  // namespace soloist

#endif  // SOLOIST_SERVER_GRPC_CONTROL_H_
