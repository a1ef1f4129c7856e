// The server while a rank is lost, over a real socket: what Health says, that requests are accepted, wait and end
// whole.
#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdio>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <thread>
#include <vector>

#include "base/clock.h"
#include "engine/simulated_engine.h"
#include "grpcpp/create_channel.h"
#include "grpcpp/generic/generic_stub.h"
#include "gtest/gtest.h"
#include "proto/soloist/v1/control.grpc.pb.h"
#include "proto/soloist/v1/inference.grpc.pb.h"
#include "scheduler/step_loop.h"
#include "server/grpc_server.h"
#include "tests/scheduler/testing.h"

namespace soloist {
namespace {

constexpr int32_t kMaxTokens = 120;

template <typename Condition>
bool Within20s(const Condition& condition) {
  for (int i = 0; i < 4'000 && !condition(); ++i) std::this_thread::sleep_for(std::chrono::milliseconds(5));
  return condition();
}

class RecoveryTest : public testing::Test {
 protected:
  RecoveryTest() {
    SimulatedOptions simulated;
    simulated.num_homes = 2;
    simulated.limits = TestLimits(64, 4);
    simulated.delay = [](int64_t, int64_t) { std::this_thread::sleep_for(std::chrono::milliseconds(2)); };
    simulated.lose = [this](int64_t, bool) -> std::optional<SimulatedLoss> {
      if (!lose_.exchange(false)) return std::nullopt;
      return SimulatedLoss{.homes = {1}, .expert_rank = std::vector<int>(16, 0)};
    };
    simulated.whole = [this](absl::Duration timeout) {
      std::unique_lock lock(mutex_);
      return changed_.wait_for(lock, absl::ToChronoNanoseconds(timeout), [this] { return back_; });
    };
    engine_ = std::make_unique<SimulatedEngine>(simulated);
    loop_ = *StepLoop::Create({}, *engine_, Clock::Real());
    frontend_ = std::make_unique<Frontend>(FrontendOptions{}, ModelDescription{}, *Tokenizer::Load("models/tiny"),
                                           Clock::Real());
    frontend_->Start(*engine_, *loop_);
    server_ = *GrpcServer::Create("127.0.0.1:0", *frontend_);
    channel_ = grpc::CreateChannel(server_->address(), grpc::InsecureChannelCredentials());
    inference_ = v1::InferenceService::NewStub(channel_);
    control_ = v1::ControlService::NewStub(channel_);
  }
  ~RecoveryTest() override {
    server_->Shutdown(absl::ZeroDuration());
    frontend_->Stop();
    loop_.reset();
  }

  void ComeBack() {
    const std::lock_guard lock(mutex_);
    back_ = true;
    changed_.notify_all();
  }
  v1::HealthResponse Health() {
    grpc::ClientContext context;
    v1::HealthResponse response;
    EXPECT_TRUE(control_->Health(&context, {}, &response).ok());
    return response;
  }
  v1::GetServerInfoResponse ServerInfo() {
    grpc::ClientContext context;
    v1::GetServerInfoResponse response;
    EXPECT_TRUE(control_->GetServerInfo(&context, {}, &response).ok());
    return response;
  }
  // What grpc.health.v1 says of the whole server; Debian has no stub for it.
  int ServingStatus() {
    grpc::GenericStub stub(channel_);
    grpc::ClientContext context;
    grpc::CompletionQueue queue;
    const grpc::Slice nothing;
    grpc::ByteBuffer empty(&nothing, 1), response;
    const auto call = stub.PrepareUnaryCall(&context, "/grpc.health.v1.Health/Check", empty, &queue);
    call->StartCall();
    grpc::Status status;
    call->Finish(&response, &status, this);
    void* tag = nullptr;
    bool ok = false;
    queue.Next(&tag, &ok);
    grpc::Slice bytes;
    if (!status.ok() || !response.DumpToSingleSlice(&bytes).ok() || bytes.size() != 2) return -1;
    return bytes.begin()[1];  // field 1, a varint
  }

  // One Generate call, read by a thread of its own.
  struct Call {
    Request asked;  // for the reference
    grpc::ClientContext context;
    std::mutex mutex;
    bool accepted = false;
    std::vector<int32_t> tokens;
    v1::FinishReason reason = v1::FINISH_REASON_UNSPECIFIED;
    grpc::Status status;
    std::thread reader;

    bool is_accepted() {
      const std::lock_guard lock(mutex);
      return accepted;
    }
    size_t num_tokens() {
      const std::lock_guard lock(mutex);
      return tokens.size();
    }
  };
  std::unique_ptr<Call> Generate(const std::string& id) {
    auto call = std::make_unique<Call>();
    call->asked = MakeRequest(id, {1, 2, id[0] % 97, 4, 5, 6, 7}, kMaxTokens);
    call->asked.sampling.seed = 11;
    call->reader = std::thread([this, id, &c = *call] {
      v1::GenerateRequest request;
      request.set_request_id(id);
      request.mutable_token_ids()->mutable_ids()->Add(c.asked.prompt.begin(), c.asked.prompt.end());
      request.mutable_sampling()->set_max_tokens(kMaxTokens);
      request.mutable_sampling()->set_seed(c.asked.sampling.seed);
      const auto stream = inference_->Generate(&c.context, request);
      for (v1::GenerateResponse response; stream->Read(&response);) {
        const std::lock_guard lock(c.mutex);
        c.accepted |= response.has_accepted();
        c.tokens.insert(c.tokens.end(), response.delta().token_ids().begin(), response.delta().token_ids().end());
        if (response.has_finished()) c.reason = response.finished().reason();
      }
      c.status = stream->Finish();
    });
    return call;
  }
  static void ExpectWhole(Call& call) {
    call.reader.join();
    EXPECT_TRUE(call.status.ok()) << call.status.error_message();
    EXPECT_EQ(call.reason, v1::FINISH_REASON_LENGTH);
    EXPECT_EQ(call.tokens, ReferenceRun(call.asked, 0, {}, 97).tokens) << call.asked.id;
  }

  std::mutex mutex_;
  std::condition_variable changed_;
  bool back_ = false;
  std::atomic<bool> lose_ = false;
  std::unique_ptr<SimulatedEngine> engine_;
  std::unique_ptr<StepLoop> loop_;
  std::unique_ptr<Frontend> frontend_;
  std::unique_ptr<GrpcServer> server_;
  std::shared_ptr<grpc::Channel> channel_;
  std::unique_ptr<v1::InferenceService::Stub> inference_;
  std::unique_ptr<v1::ControlService::Stub> control_;
};

TEST_F(RecoveryTest, DegradedServingAndWholeInTheEnd) {
  EXPECT_EQ(Health().state(), v1::HEALTH_STATE_READY);
  EXPECT_EQ(ServerInfo().layout().expert_rank(15), 1);
  std::vector<std::unique_ptr<Call>> running;
  for (const char* id : {"a", "b", "c", "d"}) running.push_back(Generate(id));
  ASSERT_TRUE(Within20s(
      [&] { return std::ranges::all_of(running, [](const auto& call) { return call->num_tokens() >= 3; }); }));
  lose_ = true;
  ASSERT_TRUE(Within20s([&] { return Health().state() == v1::HEALTH_STATE_DEGRADED; }));

  const v1::HealthResponse degraded = Health();
  ASSERT_EQ(degraded.checks_size(), 4);
  const v1::HealthCheck &engine = degraded.checks(0), &first = degraded.checks(2), &lost = degraded.checks(3);
  EXPECT_EQ(engine.name(), "engine");
  EXPECT_FALSE(engine.ok());
  for (const char* part : {"recovering since 2", "ranks 1 are lost", "waiting until", "4 running"}) {
    EXPECT_NE(engine.message().find(part), std::string::npos) << engine.message();
  }
  EXPECT_EQ(degraded.checks(1).name(), "admission");
  EXPECT_TRUE(degraded.checks(1).ok());
  EXPECT_TRUE(first.ok());
  EXPECT_EQ(lost.name(), "rank/1");
  EXPECT_FALSE(lost.ok());
  EXPECT_NE(lost.message().find("lost in step "), std::string::npos) << lost.message();
  EXPECT_EQ(ServingStatus(), 1);  // SERVING

  // Accepted, without a token; and a running one is aborted.
  const auto late = Generate("late");
  EXPECT_TRUE(Within20s([&] { return late->is_accepted(); }));
  grpc::ClientContext context;
  v1::AbortRequest abort;
  abort.set_request_id("a");
  v1::AbortResponse aborted;
  EXPECT_TRUE(inference_->Abort(&context, abort, &aborted).ok());
  running[0]->reader.join();
  EXPECT_EQ(running[0]->reason, v1::FINISH_REASON_CANCELLED);
  EXPECT_EQ(late->num_tokens(), 0u);
  EXPECT_EQ(Health().state(), v1::HEALTH_STATE_DEGRADED);

  ComeBack();
  for (size_t i = 1; i < running.size(); ++i) ExpectWhole(*running[i]);
  ExpectWhole(*late);
  EXPECT_EQ(Health().state(), v1::HEALTH_STATE_READY);
  EXPECT_EQ(Health().checks(0).message(), "running");
  EXPECT_EQ(ServerInfo().layout().expert_rank(15), 0);  // as the recovery left it
  EXPECT_EQ(ServingStatus(), 1);
  EXPECT_GT(loop_->Load().requeued_sequences, 0);
  std::printf("%s\nthen READY, and 4 requests whole\n", engine.message().c_str());
}

}  // namespace
}  // namespace soloist
