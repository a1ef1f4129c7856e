#include "engine/cluster/wire.h"

#include <bit>
#include <cstring>
#include <iterator>
#include <utility>

#include "base/check.h"
#include "base/status.h"
#include "google/protobuf/io/coded_stream.h"
#include "google/protobuf/io/zero_copy_stream.h"
#include "google/protobuf/wire_format_lite.h"
#include "grpcpp/support/proto_buffer_reader.h"
#include "grpcpp/support/slice.h"

namespace soloist {
namespace {

using google::protobuf::internal::WireFormatLite;
using google::protobuf::io::CodedInputStream;
using google::protobuf::io::CodedOutputStream;
using worker::v1::LeaderMessage;
using worker::v1::WorkerMessage;

static_assert(std::endian::native == std::endian::little, "plans and results travel as they lie in memory");

constexpr int64_t kResultMagic = 0x31524c53;  // "SLR1"
enum : int {
  kMagic,
  kRows,
  kTop,
  kLogits,
  kExperts,
  kGroups,
  kNameBytes,
  kDeviceNs,
  kIdleNs,
  kEnqueueNs,
  kOverflowRows,
  kCommNs,
  kCommWaitNs,
  kHeaderWords
};
// Keeps sums of sizes within int64.
constexpr int64_t kMaxEntries = int64_t{1} << 40;

constexpr uint32_t Tag(int field, WireFormatLite::WireType type) {
  return static_cast<uint32_t>(field) << 3 | static_cast<uint32_t>(type);
}
constexpr uint32_t kVarint1 = Tag(1, WireFormatLite::WIRETYPE_VARINT);
constexpr uint32_t kVarint2 = Tag(2, WireFormatLite::WIRETYPE_VARINT);
constexpr uint32_t kBytes1 = Tag(1, WireFormatLite::WIRETYPE_LENGTH_DELIMITED);
constexpr uint32_t kBytes2 = Tag(2, WireFormatLite::WIRETYPE_LENGTH_DELIMITED);
constexpr uint32_t kBytes3 = Tag(3, WireFormatLite::WIRETYPE_LENGTH_DELIMITED);

template <typename T>
void AppendArray(const std::vector<T>& values, std::string& out) {
  if (!values.empty()) out.append(reinterpret_cast<const char*>(values.data()), values.size() * sizeof(T));
}

template <typename T>
std::string_view TakeArray(std::string_view bytes, int64_t count, std::vector<T>& values) {
  values.resize(static_cast<size_t>(count));
  const size_t size = values.size() * sizeof(T);
  bytes.copy(reinterpret_cast<char*>(values.data()), size);
  return bytes.substr(size);
}

// Head of a message whose only field is a submessage (field 1) of `fields` followed by `payload_tag` and the payload.
grpc::Slice Head(const uint64_t* varints, int count, uint32_t payload_tag, size_t payload_bytes) {
  uint8_t inner[64];
  uint8_t* at = inner;
  for (int i = 0; i < count; ++i) {
    at = CodedOutputStream::WriteTagToArray(Tag(i + 1, WireFormatLite::WIRETYPE_VARINT), at);
    at = CodedOutputStream::WriteVarint64ToArray(varints[i], at);
  }
  at = CodedOutputStream::WriteTagToArray(payload_tag, at);
  at = CodedOutputStream::WriteVarint64ToArray(payload_bytes, at);
  uint8_t head[80];
  uint8_t* end = CodedOutputStream::WriteTagToArray(kBytes1, head);
  end = CodedOutputStream::WriteVarint64ToArray(static_cast<uint64_t>(at - inner) + payload_bytes, end);
  std::memcpy(end, inner, static_cast<size_t>(at - inner));
  end += at - inner;
  return {head, static_cast<size_t>(end - head)};
}

// A slice that owns `owner`, whose bytes are at `data`.
template <typename T>
grpc::Slice Owning(T owner, std::string_view (*bytes_of)(const T&)) {
  auto* kept = new T(std::move(owner));
  const std::string_view bytes = bytes_of(*kept);
  return {const_cast<char*>(bytes.data()), bytes.size(), [](void* p) { delete static_cast<T*>(p); }, kept};
}

grpc::ByteBuffer Join(grpc::Slice head, grpc::Slice payload) {
  const grpc::Slice slices[] = {std::move(head), std::move(payload)};
  return {slices, 2};
}

template <typename Message>
grpc::ByteBuffer EncodeMessage(const Message& message) {
  std::string bytes;
  CHECK(message.SerializeToString(&bytes));
  const grpc::Slice slice =
      Owning<std::string>(std::move(bytes), [](const std::string& s) -> std::string_view { return s; });
  return {&slice, 1};
}

// Reads a submessage that was announced by kBytes1: varints of fields 1 and 2, and `read_payload(size)` for the bytes
// of field `payload_tag`. False for anything else.
template <typename ReadPayload>
bool ReadHot(CodedInputStream& in, size_t total_bytes, uint32_t payload_tag, uint64_t (&varints)[2],
             ReadPayload read_payload) {
  uint32_t size = 0;
  if (!in.ReadVarint32(&size)) return false;
  // The submessage is all there is; else a stream that ends too early would pass for one that ends well.
  if (static_cast<size_t>(in.CurrentPosition()) + size != total_bytes) return false;
  in.PushLimit(static_cast<int>(size));
  for (uint32_t tag = in.ReadTag(); tag != 0; tag = in.ReadTag()) {
    uint32_t bytes = 0;
    if (tag == payload_tag) {
      if (!in.ReadVarint32(&bytes) || static_cast<int64_t>(bytes) > in.BytesUntilLimit() || !read_payload(bytes)) {
        return false;
      }
    } else if (tag == kVarint1 || tag == kVarint2) {
      if (!in.ReadVarint64(&varints[tag == kVarint1 ? 0 : 1])) return false;
    } else if (!WireFormatLite::SkipField(&in, tag)) {
      return false;
    }
  }
  return in.ConsumedEntireMessage();
}

template <typename Message>
bool ReadPlain(grpc::ByteBuffer& bytes, Message& message) {
  grpc::ProtoBufferReader reader(&bytes);
  return reader.status().ok() && message.ParseFromZeroCopyStream(&reader);
}

// Whether field 1, the hot one, comes first; protobuf writes fields in order, and there is only one.
bool IsHot(grpc::ByteBuffer& bytes) {
  grpc::ProtoBufferReader reader(&bytes);
  const void* data = nullptr;
  int size = 0;
  while (reader.status().ok() && reader.Next(&data, &size)) {
    if (size > 0) return *static_cast<const uint8_t*>(data) == kBytes1;
  }
  return false;
}

}  // namespace

std::string PackHomeResult(const HomeResult& result) {
  CHECK_EQ(result.tokens.size(), result.logprobs.size());
  CHECK_EQ(result.top_tokens.size(), result.top_logprobs.size());
  std::vector<int64_t> times;
  int64_t name_bytes = 0;
  for (const GroupTime& group : result.groups) {
    times.push_back(group.ns);
    name_bytes += std::ssize(group.group) + 1;
  }
  std::vector<int64_t> header(kHeaderWords, 0);
  header[kMagic] = kResultMagic;
  header[kRows] = std::ssize(result.tokens);
  header[kTop] = std::ssize(result.top_tokens);
  header[kLogits] = std::ssize(result.raw_logits);
  header[kExperts] = std::ssize(result.expert_rows);
  header[kGroups] = std::ssize(result.groups);
  header[kNameBytes] = name_bytes;
  header[kDeviceNs] = result.device_ns;
  header[kIdleNs] = result.idle_ns;
  header[kEnqueueNs] = result.enqueue_ns;
  header[kOverflowRows] = result.overflow_rows;
  header[kCommNs] = result.comm_ns;
  header[kCommWaitNs] = result.comm_wait_ns;
  std::string out;
  out.reserve(8 * (header.size() + result.expert_rows.size() + times.size()) +
              4 * (2 * result.tokens.size() + 2 * result.top_tokens.size() + result.raw_logits.size()) +
              static_cast<size_t>(name_bytes));
  AppendArray(header, out);
  AppendArray(result.expert_rows, out);
  AppendArray(times, out);
  AppendArray(result.tokens, out);
  AppendArray(result.logprobs, out);
  AppendArray(result.top_tokens, out);
  AppendArray(result.top_logprobs, out);
  AppendArray(result.raw_logits, out);
  for (const GroupTime& group : result.groups) out.append(group.group.c_str(), group.group.size() + 1);
  return out;
}

absl::StatusOr<HomeResult> ParseHomeResult(std::string_view bytes) {
  constexpr size_t kHeaderBytes = 8 * kHeaderWords;
  if (bytes.size() < kHeaderBytes) {
    return InvalidArgument("result: {} bytes, the header alone has {}", bytes.size(), kHeaderBytes);
  }
  int64_t header[kHeaderWords];
  std::memcpy(header, bytes.data(), kHeaderBytes);
  if (header[kMagic] != kResultMagic)
    return InvalidArgument("result: magic is {:#x}, not {:#x}", header[kMagic], kResultMagic);
  for (int i = kRows; i <= kNameBytes; ++i) {
    if (header[i] < 0 || header[i] > kMaxEntries) {
      return InvalidArgument("result: header word {} is {}, allowed: 0 to {}", i, header[i], kMaxEntries);
    }
  }
  const int64_t expected = static_cast<int64_t>(kHeaderBytes) + 8 * (header[kExperts] + header[kGroups]) +
                           4 * (2 * header[kRows] + 2 * header[kTop] + header[kLogits]) + header[kNameBytes];
  if (std::ssize(bytes) != expected) {
    return InvalidArgument("result: {} bytes, the header says {}", bytes.size(), expected);
  }
  HomeResult result;
  result.device_ns = header[kDeviceNs];
  result.idle_ns = header[kIdleNs];
  result.enqueue_ns = header[kEnqueueNs];
  result.overflow_rows = header[kOverflowRows];
  result.comm_ns = header[kCommNs];
  result.comm_wait_ns = header[kCommWaitNs];
  std::vector<int64_t> times;
  bytes.remove_prefix(kHeaderBytes);
  bytes = TakeArray(bytes, header[kExperts], result.expert_rows);
  bytes = TakeArray(bytes, header[kGroups], times);
  bytes = TakeArray(bytes, header[kRows], result.tokens);
  bytes = TakeArray(bytes, header[kRows], result.logprobs);
  bytes = TakeArray(bytes, header[kTop], result.top_tokens);
  bytes = TakeArray(bytes, header[kTop], result.top_logprobs);
  bytes = TakeArray(bytes, header[kLogits], result.raw_logits);
  for (const int64_t ns : times) {
    const size_t end = bytes.find('\0');
    if (end == std::string_view::npos) return InvalidArgument("result: a group has no name");
    result.groups.push_back({std::string(bytes.substr(0, end)), ns});
    bytes.remove_prefix(end + 1);
  }
  if (!bytes.empty()) return InvalidArgument("result: {} bytes after the last group's name", bytes.size());
  return result;
}

absl::Status CheckHomeResult(const HomeResult& result, int64_t rows, int64_t vocab_size, int64_t expert_counts) {
  const auto check = [](const char* what, int64_t size, int64_t wanted, bool optional) {
    return size == wanted || (optional && size == 0)
               ? absl::OkStatus()
               : InvalidArgument("result: {} entries of {}, expected {}", size, what, wanted);
  };
  RETURN_IF_ERROR(check("tokens", std::ssize(result.tokens), rows, false));
  RETURN_IF_ERROR(check("logprobs", std::ssize(result.logprobs), rows, false));
  RETURN_IF_ERROR(check("top_tokens", std::ssize(result.top_tokens), rows * kMaxTopLogprobs, true));
  RETURN_IF_ERROR(check("raw_logits", std::ssize(result.raw_logits), rows * vocab_size, true));
  RETURN_IF_ERROR(check("expert_rows", std::ssize(result.expert_rows), expert_counts, false));
  for (int64_t r = 0; r < rows; ++r) {
    if (result.tokens[r] < 0 || result.tokens[r] >= vocab_size) {
      return InvalidArgument("result: token {} of row {}, allowed: 0 to {}", result.tokens[r], r, vocab_size - 1);
    }
  }
  return absl::OkStatus();
}

grpc::ByteBuffer EncodeStep(int64_t epoch, HomePlan plan) {
  const uint64_t varints[] = {static_cast<uint64_t>(epoch)};
  grpc::Slice head = Head(varints, 1, kBytes2, plan.words().size_bytes());
  return Join(std::move(head), Owning<HomePlan>(std::move(plan), [](const HomePlan& kept) -> std::string_view {
                return {reinterpret_cast<const char*>(kept.words().data()), kept.words().size_bytes()};
              }));
}

grpc::ByteBuffer EncodeResult(int64_t epoch, int64_t step, const HomeResult& result) {
  std::string bytes = PackHomeResult(result);
  const uint64_t varints[] = {static_cast<uint64_t>(epoch), static_cast<uint64_t>(step)};
  grpc::Slice head = Head(varints, 2, kBytes3, bytes.size());
  return Join(std::move(head),
              Owning<std::string>(std::move(bytes), [](const std::string& kept) -> std::string_view { return kept; }));
}

grpc::ByteBuffer Encode(const LeaderMessage& message) { return EncodeMessage(message); }
grpc::ByteBuffer Encode(const WorkerMessage& message) { return EncodeMessage(message); }

absl::StatusOr<LeaderFrame> DecodeLeaderFrame(grpc::ByteBuffer& bytes) {
  LeaderFrame frame;
  bool ok = false;
  if (IsHot(bytes)) {
    grpc::ProtoBufferReader reader(&bytes);
    CodedInputStream in(&reader);
    uint64_t varints[2] = {0, 0};
    in.ReadTag();
    ok = ReadHot(in, bytes.Length(), kBytes2, varints, [&](uint32_t size) {
      frame.plan.resize(size / 4);
      return size % 4 == 0 && in.ReadRaw(frame.plan.data(), static_cast<int>(size));
    });
    frame.message.mutable_step()->set_epoch(static_cast<int64_t>(varints[0]));
  } else {
    ok = ReadPlain(bytes, frame.message);
  }
  if (!ok) return InvalidArgument("{} bytes from the leader are no message", bytes.Length());
  return frame;
}

absl::StatusOr<WorkerFrame> DecodeWorkerFrame(grpc::ByteBuffer& bytes) {
  WorkerFrame frame;
  bool ok = false;
  if (IsHot(bytes)) {
    grpc::ProtoBufferReader reader(&bytes);
    CodedInputStream in(&reader);
    uint64_t varints[2] = {0, 0};
    in.ReadTag();
    ok = ReadHot(in, bytes.Length(), kBytes3, varints,
                 [&](uint32_t size) { return in.ReadString(&frame.result, static_cast<int>(size)); });
    frame.message.mutable_result()->set_epoch(static_cast<int64_t>(varints[0]));
    frame.message.mutable_result()->set_step(static_cast<int64_t>(varints[1]));
  } else {
    ok = ReadPlain(bytes, frame.message);
  }
  if (!ok) return InvalidArgument("{} bytes from a worker are no message", bytes.Length());
  return frame;
}

}  // namespace soloist
