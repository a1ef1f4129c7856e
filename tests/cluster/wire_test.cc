// Steps and results as bytes: the hand-written encoding is protobuf's, and nothing but whole messages is taken.
#include "engine/cluster/wire.h"

#include <random>
#include <string>
#include <utility>
#include <vector>

#include "grpcpp/support/slice.h"
#include "gtest/gtest.h"

namespace soloist {
namespace {

std::string Bytes(const grpc::ByteBuffer& buffer) {
  std::vector<grpc::Slice> slices;
  EXPECT_TRUE(buffer.Dump(&slices).ok());
  std::string out;
  for (const grpc::Slice& slice : slices) out.append(reinterpret_cast<const char*>(slice.begin()), slice.size());
  return out;
}

// In slices of `piece` bytes, as they may come from a connection.
grpc::ByteBuffer Buffer(const std::string& bytes, size_t piece) {
  std::vector<grpc::Slice> slices;
  for (size_t at = 0; at < bytes.size(); at += piece) slices.emplace_back(bytes.substr(at, piece));
  return {slices.data(), slices.size()};
}

HomePlan SmallPlan(int64_t step, int tokens) {
  HomePlanParts parts;
  for (int i = 0; i < tokens; ++i) {
    parts.token_ids.push_back(i);
    parts.positions.push_back(i);
    parts.slot_mapping.push_back(i);
  }
  if (tokens > 0) {
    parts.query_starts = {0, tokens};
    parts.seq_lens = {tokens};
    parts.max_blocks = 1;
    parts.block_tables = {0};
  }
  return {parts, step, tokens, 0};
}

HomeResult RandomResult(std::mt19937& random) {
  HomeResult result;
  const size_t rows = random() % 5;
  for (size_t r = 0; r < rows; ++r) {
    result.tokens.push_back(static_cast<int32_t>(random() % 100));
    result.logprobs.push_back(-0.25f * static_cast<float>(random() % 100));
  }
  if (random() % 2 == 0) {
    for (size_t i = 0; i < rows * kMaxTopLogprobs; ++i) {
      result.top_tokens.push_back(static_cast<int32_t>(i));
      result.top_logprobs.push_back(-1.0f);
    }
  }
  if (random() % 2 == 0) result.raw_logits.assign(rows * 100, 0.5f);
  for (int i = 0; i < 12; ++i) result.expert_rows.push_back(static_cast<int64_t>(random()) << 8);
  result.overflow_rows = static_cast<int64_t>(random() % 3);
  result.comm_ns = static_cast<int64_t>(random());
  result.comm_wait_ns = static_cast<int64_t>(random());
  result.device_ns = static_cast<int64_t>(random());
  result.idle_ns = 5;
  result.enqueue_ns = static_cast<int64_t>(random()) << 20;
  for (size_t g = random() % 3; g > 0; --g) result.groups.push_back({std::string(g, 'x'), static_cast<int64_t>(g)});
  return result;
}

TEST(WireTest, ResultsComeBackAsTheyWere) {
  std::mt19937 random(3);
  for (int i = 0; i < 200; ++i) {
    const HomeResult result = RandomResult(random);
    const std::string bytes = PackHomeResult(result);
    const auto parsed = ParseHomeResult(bytes);
    ASSERT_EQ(parsed.status(), absl::OkStatus());
    EXPECT_EQ(parsed->tokens, result.tokens);
    EXPECT_EQ(parsed->logprobs, result.logprobs);
    EXPECT_EQ(parsed->top_tokens, result.top_tokens);
    EXPECT_EQ(parsed->top_logprobs, result.top_logprobs);
    EXPECT_EQ(parsed->raw_logits, result.raw_logits);
    EXPECT_EQ(parsed->expert_rows, result.expert_rows);
    EXPECT_EQ(parsed->overflow_rows, result.overflow_rows);
    EXPECT_EQ(parsed->comm_ns, result.comm_ns);
    EXPECT_EQ(parsed->comm_wait_ns, result.comm_wait_ns);
    EXPECT_EQ(parsed->device_ns, result.device_ns);
    EXPECT_EQ(parsed->idle_ns, result.idle_ns);
    EXPECT_EQ(parsed->enqueue_ns, result.enqueue_ns);
    ASSERT_EQ(parsed->groups.size(), result.groups.size());
    for (size_t g = 0; g < result.groups.size(); ++g) {
      EXPECT_EQ(parsed->groups[g].group, result.groups[g].group);
      EXPECT_EQ(parsed->groups[g].ns, result.groups[g].ns);
    }
    // No prefix, and nothing longer, is a result.
    for (size_t size = 0; size < bytes.size(); size += 1 + bytes.size() / 40) {
      EXPECT_FALSE(ParseHomeResult(std::string_view(bytes).substr(0, size)).ok());
    }
    EXPECT_FALSE(ParseHomeResult(bytes + '\0').ok());
  }
}

TEST(WireTest, AResultIsCheckedAgainstItsPlan) {
  HomeResult result;
  result.tokens = {3, 4};
  result.logprobs = {-1, -2};
  result.expert_rows.assign(12, 1);
  EXPECT_EQ(CheckHomeResult(result, 2, 100, 12), absl::OkStatus());
  EXPECT_FALSE(CheckHomeResult(result, 3, 100, 12).ok());
  EXPECT_FALSE(CheckHomeResult(result, 2, 4, 12).ok());  // token 4 of a vocabulary of 4
  EXPECT_FALSE(CheckHomeResult(result, 2, 100, 13).ok());
  result.raw_logits.assign(199, 0);
  EXPECT_FALSE(CheckHomeResult(result, 2, 100, 12).ok());
  result.raw_logits.assign(200, 0);
  EXPECT_EQ(CheckHomeResult(result, 2, 100, 12), absl::OkStatus());
}

TEST(WireTest, StepsAndResultsAreWhatTheSchemaSays) {
  std::mt19937 random(4);
  for (const int64_t epoch : {int64_t{1}, int64_t{300}, int64_t{1} << 40}) {
    for (const int tokens : {0, 1, 7, 5000}) {
      const HomePlan plan = SmallPlan(epoch + 7, tokens);
      const std::vector<int32_t> words(plan.words().begin(), plan.words().end());
      const std::string bytes = Bytes(EncodeStep(epoch, plan));
      worker::v1::LeaderMessage message;
      ASSERT_TRUE(message.ParseFromString(bytes));
      EXPECT_EQ(message.step().epoch(), epoch);
      EXPECT_EQ(message.step().plan(), std::string(reinterpret_cast<const char*>(words.data()), words.size() * 4));
      EXPECT_EQ(message.SerializeAsString(), bytes);
      for (const size_t piece : {size_t{1}, size_t{3}, size_t{1} << 20}) {
        grpc::ByteBuffer buffer = Buffer(bytes, piece);
        const auto frame = DecodeLeaderFrame(buffer);
        ASSERT_EQ(frame.status(), absl::OkStatus());
        EXPECT_EQ(frame->message.step().epoch(), epoch);
        EXPECT_EQ(frame->plan, words);
      }
    }
    const HomeResult result = RandomResult(random);
    const std::string bytes = Bytes(EncodeResult(epoch, 99, result));
    worker::v1::WorkerMessage message;
    ASSERT_TRUE(message.ParseFromString(bytes));
    EXPECT_EQ(message.result().result(), PackHomeResult(result));
    EXPECT_EQ(message.SerializeAsString(), bytes);
    grpc::ByteBuffer buffer = Buffer(bytes, 11);
    const auto frame = DecodeWorkerFrame(buffer);
    ASSERT_EQ(frame.status(), absl::OkStatus());
    EXPECT_EQ(frame->message.result().epoch(), epoch);
    EXPECT_EQ(frame->message.result().step(), 99);
    EXPECT_EQ(frame->result, PackHomeResult(result));
  }
}

TEST(WireTest, OtherMessagesAreProtobufs) {
  worker::v1::WorkerMessage hello;
  hello.mutable_hello()->set_host("h");
  hello.mutable_hello()->set_wanted_rank(-1);
  grpc::ByteBuffer buffer = Encode(hello);
  const auto frame = DecodeWorkerFrame(buffer);
  ASSERT_EQ(frame.status(), absl::OkStatus());
  EXPECT_EQ(frame->message.SerializeAsString(), hello.SerializeAsString());
}

TEST(WireTest, CutOrChangedBytesAreRefused) {
  const std::string bytes = Bytes(EncodeStep(5, SmallPlan(1, 4)));
  for (size_t size = 1; size < bytes.size(); ++size) {
    grpc::ByteBuffer buffer = Buffer(bytes.substr(0, size), 64);
    EXPECT_FALSE(DecodeLeaderFrame(buffer).ok()) << size;
  }
  // A plan that is no number of words.
  worker::v1::LeaderMessage message;
  message.mutable_step()->set_plan("abc");
  grpc::ByteBuffer odd = Encode(message);
  EXPECT_FALSE(DecodeLeaderFrame(odd).ok());
  // A length far beyond the message: refused before anything is allocated.
  grpc::ByteBuffer huge = Buffer(std::string("\x0a\x06\x12\xff\xff\xff\xff\x07", 8), 64);
  EXPECT_FALSE(DecodeLeaderFrame(huge).ok());
}

}  // namespace
}  // namespace soloist
