// A worker that computes nothing: a client that is none of ours, which tells the leader what it wants to hear. Its
// results have the size of real ones, and token 0 in every row.
#ifndef SOLOIST_TESTS_CLUSTER_FAKE_WORKER_H_
#define SOLOIST_TESTS_CLUSTER_FAKE_WORKER_H_

#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "engine/cluster/fingerprint.h"
#include "engine/cluster/wire.h"
#include "engine/model/config.h"
#include "grpcpp/create_channel.h"
#include "proto/worker.grpc.pb.h"
#include "tests/cluster/thread_cluster.h"

namespace soloist {

inline worker::v1::WorkerMessage GoodHello(int rank) {
  worker::v1::WorkerMessage message;
  worker::v1::Hello& hello = *message.mutable_hello();
  hello.set_schema_revision(kWorkerSchemaRevision);
  hello.set_version(kTestVersion);
  static const std::string& build = *new std::string(ExecutableFingerprint().value());
  hello.set_build_id(build);
  hello.set_device_kind("cpu");
  hello.set_cpu_gemm("auto");
  hello.set_wanted_rank(rank);
  return message;
}

// A stream to the leader by a client that is none of ours; it breaks when this ends.
class Caller {
 public:
  explicit Caller(const std::string& leader)
      : stub_(worker::v1::Cluster::NewStub(grpc::CreateChannel(leader, grpc::InsecureChannelCredentials()))),
        stream_(stub_->Join(&context_)) {}
  ~Caller() { context_.TryCancel(); }
  Caller(const Caller&) = delete;
  Caller& operator=(const Caller&) = delete;

  // The leader's first answer to a good Hello with a change: why it refuses it, or OK.
  absl::Status Say(const std::function<void(worker::v1::Hello&)>& change) {
    worker::v1::WorkerMessage message = GoodHello(-1);
    change(*message.mutable_hello());
    stream_->Write(message);
    worker::v1::LeaderMessage answer;
    if (!stream_->Read(&answer) || !answer.has_stop()) return absl::OkStatus();
    return {static_cast<absl::StatusCode>(answer.stop().code()), answer.stop().reason()};
  }

 private:
  grpc::ClientContext context_;
  const std::unique_ptr<worker::v1::Cluster::Stub> stub_;
  const std::unique_ptr<grpc::ClientReaderWriter<worker::v1::WorkerMessage, worker::v1::LeaderMessage>> stream_;
};
inline absl::Status SayHello(const std::string& leader, const std::function<void(worker::v1::Hello&)>& change) {
  return Caller(leader).Say(change);
}

class FakeWorker {
 public:
  // `free_bytes`: that it has when its group has broken.
  FakeWorker(const std::string& leader, const std::string& model_dir, int rank, int64_t free_bytes)
      : model_dir_(model_dir),
        free_bytes_(free_bytes),
        expert_counts_(ExpertCounts(model_dir)),
        stub_(worker::v1::Cluster::NewStub(grpc::CreateChannel(leader, grpc::InsecureChannelCredentials()))),
        thread_([this, rank] { Run(rank); }) {}
  ~FakeWorker() {
    Vanish();
    Wait();
  }
  void Vanish() { context_.TryCancel(); }
  // Until the leader ends the stream, or has lost it.
  void Wait() {
    if (thread_.joinable()) thread_.join();
  }

 private:
  static int64_t ExpertCounts(const std::string& model_dir) {
    const ModelConfig config = LoadModelConfig(model_dir).value();
    return int64_t{config.num_layers} * config.num_experts;
  }
  void Run(int rank) {
    const auto stream = stub_->Join(&context_);
    stream->Write(GoodHello(rank));
    for (worker::v1::LeaderMessage in; stream->Read(&in);) {
      const worker::v1::WorkerMessage out = AnswerTo(in);
      if (out.kind_case() != worker::v1::WorkerMessage::KIND_NOT_SET) stream->Write(out);
    }
    stream->Finish();
  }
  worker::v1::WorkerMessage AnswerTo(const worker::v1::LeaderMessage& in) const {
    worker::v1::WorkerMessage out;
    if (in.has_step()) {
      const std::string& bytes = in.step().plan();
      std::vector<int32_t> words(bytes.size() / sizeof(int32_t));
      std::memcpy(words.data(), bytes.data(), words.size() * sizeof(int32_t));
      const HomePlan plan = HomePlan::Parse(std::move(words)).value();
      HomeResult result;
      result.tokens.resize(plan.num_logit_rows());
      result.logprobs.resize(plan.num_logit_rows());
      result.expert_rows.resize(expert_counts_);
      out.mutable_result()->set_epoch(in.step().epoch());
      out.mutable_result()->set_step(plan.step());
      out.mutable_result()->set_result(PackHomeResult(result));
    } else if (in.has_assignment()) {
      out.mutable_loaded()->set_free_bytes(int64_t{1} << 40);
      out.mutable_loaded()->set_config_hash(ConfigFingerprint(model_dir_).value());
      out.mutable_loaded()->set_checkpoint_hash(CheckpointFingerprint(model_dir_).value_or(""));
    } else if (in.has_allocate()) {
      out.mutable_allocated()->set_num_blocks(in.allocate().num_blocks());
    } else if (in.has_place()) {
      out.mutable_placed()->set_number(in.place().number());
    } else if (in.has_join_group()) {
      out.mutable_comm_ready()->set_epoch(in.join_group().epoch());
    } else if (in.has_warm_up()) {
      out.mutable_ready()->set_epoch(in.warm_up().epoch());
    } else if (in.has_abort_group()) {
      out.mutable_aborted()->set_epoch(in.abort_group().epoch());
      out.mutable_aborted()->set_free_bytes(free_bytes_);
    }
    return out;
  }

  const std::string model_dir_;
  const int64_t free_bytes_;
  const int64_t expert_counts_;  // of a result
  grpc::ClientContext context_;
  const std::unique_ptr<worker::v1::Cluster::Stub> stub_;
  std::thread thread_;
};

}  // namespace soloist

#endif  // SOLOIST_TESTS_CLUSTER_FAKE_WORKER_H_
