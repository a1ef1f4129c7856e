// Messages of proto/worker.proto as gRPC byte buffers. What a step costs, the Step down and the Result up, is packed
// and unpacked here by hand (the bytes are those of the schema): a plan goes out without being copied, and comes in
// with one copy, straight into its words. Everything else is protobuf's.
#ifndef SOLOIST_ENGINE_CLUSTER_WIRE_H_
#define SOLOIST_ENGINE_CLUSTER_WIRE_H_

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "engine/step.h"
#include "grpcpp/support/byte_buffer.h"
#include "proto/worker.pb.h"

namespace soloist {

// Grows with each change to worker.proto or to what follows.
inline constexpr int32_t kWorkerSchemaRevision = 3;

// A HomeResult as bytes: thirteen little-endian 64-bit words (magic; rows; entries of top_tokens, raw_logits,
// expert_rows; groups; bytes of group names; device_ns; idle_ns; enqueue_ns; overflow_rows; comm_ns; comm_wait_ns),
// then the arrays in the order of the struct (expert_rows as 64-bit words first, then the groups' times, then what has
// 32 bits), then per group its name and a zero.
std::string PackHomeResult(const HomeResult& result);
// INVALID_ARGUMENT unless the sizes add up; contents are as they came.
absl::StatusOr<HomeResult> ParseHomeResult(std::string_view bytes);

// What a result must be before anyone reads it: `rows` rows, tokens of a vocabulary of `vocab_size`, the optional
// sections there or not, expert_rows of `expert_counts` entries. INVALID_ARGUMENT says what is not.
absl::Status CheckHomeResult(const HomeResult& result, int64_t rows, int64_t vocab_size, int64_t expert_counts);

grpc::ByteBuffer EncodeStep(int64_t epoch, HomePlan plan);
grpc::ByteBuffer EncodeResult(int64_t epoch, int64_t step, const HomeResult& result);
grpc::ByteBuffer Encode(const worker::v1::LeaderMessage& message);
grpc::ByteBuffer Encode(const worker::v1::WorkerMessage& message);

// `message` holds everything but a step's plan and a step's result.
struct LeaderFrame {
  worker::v1::LeaderMessage message;
  std::vector<int32_t> plan;  // of a step; still to be parsed and validated
};
struct WorkerFrame {
  worker::v1::WorkerMessage message;
  std::string result;  // of a result; for ParseHomeResult
};

// INVALID_ARGUMENT for bytes that are no message.
absl::StatusOr<LeaderFrame> DecodeLeaderFrame(grpc::ByteBuffer& bytes);
absl::StatusOr<WorkerFrame> DecodeWorkerFrame(grpc::ByteBuffer& bytes);

}  // namespace soloist

#endif  // SOLOIST_ENGINE_CLUSTER_WIRE_H_
