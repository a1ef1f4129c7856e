#include "server/grpc_control.h"

#include "base/status.h"
#include "server/grpc_convert.h"

namespace soloist {
namespace {

grpc::ServerUnaryReactor* Reply(grpc::CallbackServerContext& context, const absl::Status& status) {
  grpc::ServerUnaryReactor* reactor = context.DefaultReactor();
  reactor->Finish(ToGrpc(status));
  return reactor;
}

absl::Status Loading() { return Unavailable("the model is loading: try again later"); }

}  // namespace

grpc::ServerUnaryReactor* ControlService::GetServerInfo(grpc::CallbackServerContext* context,
                                                        const v1::GetServerInfoRequest*,
                                                        v1::GetServerInfoResponse* response) {
  *response = ServerInfoToProto(frontend_);
  return Reply(*context, absl::OkStatus());
}

grpc::ServerUnaryReactor* ControlService::GetModelInfo(grpc::CallbackServerContext* context,
                                                       const v1::GetModelInfoRequest*,
                                                       v1::GetModelInfoResponse* response) {
  if (frontend_.engine() == nullptr) return Reply(*context, Loading());
  *response = ModelInfoToProto(frontend_);
  return Reply(*context, absl::OkStatus());
}

grpc::ServerUnaryReactor* ControlService::GetLoad(grpc::CallbackServerContext* context, const v1::GetLoadRequest*,
                                                  v1::GetLoadResponse* response) {
  const StepLoop* loop = frontend_.loop();
  if (loop == nullptr) return Reply(*context, Loading());
  *response = LoadToProto(loop->Load(), frontend_);
  return Reply(*context, absl::OkStatus());
}

grpc::ServerUnaryReactor* ControlService::Health(grpc::CallbackServerContext* context, const v1::HealthRequest*,
                                                 v1::HealthResponse* response) {
  *response = ToProto(frontend_.Health());
  return Reply(*context, absl::OkStatus());
}

grpc::ServerUnaryReactor* ControlService::Drain(grpc::CallbackServerContext* context, const v1::DrainRequest*,
                                                v1::DrainResponse* response) {
  frontend_.Drain();
  response->set_open_streams(frontend_.open_streams());
  return Reply(*context, absl::OkStatus());
}

}  // namespace soloist
