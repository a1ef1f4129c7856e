// Bytes from anywhere as messages between leader and worker: frames, results, and what ranks tell each other through
// the leader to form a group. What is let through must be what it claims, and come out of the encoder as it went in.
#include <algorithm>
#include <cstdint>
#include <map>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "base/check.h"
#include "engine/cluster/bootstrap_streams.h"
#include "engine/cluster/wire.h"

namespace {

using soloist::worker::v1::WorkerMessage;

constexpr int64_t kRows = 3, kVocab = 64, kCounts = 4;

grpc::ByteBuffer BufferOf(std::string_view bytes) {
  // In two slices, as a stream may bring them.
  const grpc::Slice slices[] = {grpc::Slice(bytes.data(), bytes.size() / 2),
                                grpc::Slice(bytes.data() + bytes.size() / 2, bytes.size() - bytes.size() / 2)};
  return {slices, 2};
}

void CheckResult(const std::string& bytes) {
  const absl::StatusOr<soloist::HomeResult> result = soloist::ParseHomeResult(bytes);
  if (!result.ok()) return;
  CHECK(soloist::PackHomeResult(*result) == bytes);
  if (!soloist::CheckHomeResult(*result, kRows, kVocab, kCounts).ok()) return;
  CHECK_EQ(std::ssize(result->tokens), kRows);
  CHECK_EQ(std::ssize(result->logprobs), kRows);
  CHECK_EQ(std::ssize(result->expert_rows), kCounts);
  for (const int32_t token : result->tokens) CHECK(token >= 0 && token < kVocab);
}

void CheckWorkerFrame(std::string_view bytes) {
  grpc::ByteBuffer buffer = BufferOf(bytes);
  const absl::StatusOr<soloist::WorkerFrame> frame = soloist::DecodeWorkerFrame(buffer);
  if (!frame.ok()) return;
  if (frame->message.has_result()) return CheckResult(frame->result);
  grpc::ByteBuffer again = soloist::Encode(frame->message);
  const auto second = soloist::DecodeWorkerFrame(again);
  CHECK_OK(second.status());
  CHECK(second->message.SerializeAsString() == frame->message.SerializeAsString());
}

void CheckLeaderFrame(std::string_view bytes) {
  grpc::ByteBuffer buffer = BufferOf(bytes);
  absl::StatusOr<soloist::LeaderFrame> frame = soloist::DecodeLeaderFrame(buffer);
  if (!frame.ok()) return;
  if (!frame->message.has_step()) return;
  const absl::StatusOr<soloist::HomePlan> plan = soloist::HomePlan::Parse(std::move(frame->plan));
  if (!plan.ok()) return;
  grpc::ByteBuffer again = soloist::EncodeStep(frame->message.step().epoch(), *plan);
  const auto second = soloist::DecodeLeaderFrame(again);
  CHECK_OK(second.status());
  CHECK_EQ(second->message.step().epoch(), frame->message.step().epoch());
  CHECK(std::ranges::equal(second->plan, plan->words()));
}

// Messages one after another, each of a length byte and so many bytes, from clients in turn: nobody gets a value that
// nobody has set, and what is set stays.
void CheckBootstrap(std::string_view bytes) {
  soloist::BootstrapTable<int> table;
  table.Start(1);
  std::map<std::string, std::string> set;
  for (int client = 0; !bytes.empty(); client = (client + 1) % 4) {
    const auto size = std::min<size_t>(static_cast<uint8_t>(bytes[0]), bytes.size() - 1);
    WorkerMessage message;
    const bool parsed = message.ParseFromArray(bytes.data() + 1, static_cast<int>(size));
    bytes.remove_prefix(1 + size);
    if (!parsed) continue;
    std::vector<soloist::BootstrapTable<int>::Answer> answers;
    if (message.has_bootstrap_set()) {
      answers = table.Set(client, message.bootstrap_set());
      if (message.bootstrap_set().epoch() == 1) {
        set.emplace(message.bootstrap_set().key(), message.bootstrap_set().value());
      }
    } else if (message.has_bootstrap_get()) {
      answers = table.Get(client, message.bootstrap_get());
    }
    for (const auto& answer : answers) {
      const auto& value = answer.message.bootstrap_value();
      CHECK_EQ(value.epoch(), 1);
      CHECK(set.contains(value.key()) && set[value.key()] == value.value());
    }
  }
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  if (size == 0) return 0;
  const std::string_view bytes(reinterpret_cast<const char*>(data) + 1, size - 1);
  switch (data[0] % 4) {
    case 0:
      CheckWorkerFrame(bytes);
      break;
    case 1:
      CheckLeaderFrame(bytes);
      break;
    case 2:
      CheckResult(std::string(bytes));
      break;
    default:
      CheckBootstrap(bytes);
  }
  return 0;
}
