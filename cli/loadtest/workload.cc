#include "cli/loadtest/workload.h"

#include <algorithm>
#include <cmath>
#include <fstream>

#include "absl/strings/numbers.h"
#include "absl/strings/str_split.h"
#include "base/status.h"
#include "nlohmann/json.hpp"

namespace soloist::cli {
namespace {

using Json = nlohmann::json;

constexpr int kTraceBlock = 512;
constexpr int kMaxLength = 1 << 24;

int32_t RandomToken(std::mt19937_64& random, int vocab_size) {
  return static_cast<int32_t>(random() % static_cast<uint64_t>(vocab_size));
}

void AppendRandom(int count, int vocab_size, std::mt19937_64& random, std::vector<int32_t>& out) {
  for (int i = 0; i < count; ++i) out.push_back(RandomToken(random, vocab_size));
}

RequestSource FromVector(std::vector<PlannedRequest> requests) {
  return [requests = std::move(requests), next = size_t{0}]() mutable -> std::optional<PlannedRequest> {
    if (next == requests.size()) return std::nullopt;
    return std::move(requests[next++]);
  };
}

// The text of a turn; empty if it is none.
std::string TurnText(const Json& turns, size_t index) {
  if (!turns.is_array() || turns.size() <= index || !turns[index].is_object()) return "";
  for (const char* key : {"value", "content"}) {
    if (turns[index].contains(key) && turns[index][key].is_string()) return turns[index][key].get<std::string>();
  }
  return "";
}

// The request that an object of a dataset stands for; none if it lacks something.
absl::StatusOr<std::optional<PlannedRequest>> FromObject(
    const Json& object, const std::function<absl::StatusOr<int>(const std::string& text)>& count_tokens) {
  if (!object.is_object()) return std::nullopt;
  PlannedRequest request;
  if (object.contains("prompt") && object["prompt"].is_string()) {
    request.text = object["prompt"].get<std::string>();
    for (const char* key : {"output_len", "output_length"}) {
      if (object.contains(key) && object[key].is_number_integer()) request.output_tokens = object[key].get<int>();
    }
    if (!object.contains("output_len") && !object.contains("output_length")) return std::nullopt;
  } else {
    const Json turns = object.value("conversations", object.value("messages", Json()));
    request.text = TurnText(turns, 0);
    const std::string answer = TurnText(turns, 1);
    if (answer.empty()) return std::nullopt;
    ASSIGN_OR_RETURN(request.output_tokens, count_tokens(answer));
  }
  if (request.text.empty() || request.output_tokens < 1 || request.output_tokens > kMaxLength) return std::nullopt;
  return request;
}

}  // namespace

absl::StatusOr<LengthDistribution> LengthDistribution::Parse(std::string_view text) {
  const std::vector<std::string> parts = absl::StrSplit(absl::string_view(text.data(), text.size()), ':');
  LengthDistribution out;
  size_t first = 1;
  if (parts.size() == 1) {
    first = 0;
  } else if (parts[0] == "uniform") {
    out.kind_ = Kind::kUniform;
  } else if (parts[0] == "normal") {
    out.kind_ = Kind::kNormal;
  } else if (parts[0] == "lognormal") {
    out.kind_ = Kind::kLognormal;
  } else {
    return InvalidArgument("length '{}': not N, uniform:LOW:HIGH, normal:MEAN:STDDEV or lognormal:MEDIAN:SIGMA", text);
  }
  const bool two = first == 1;
  if (parts.size() != (two ? 3 : 1) || !absl::SimpleAtod(parts[first], &out.a_) ||
      (two && !absl::SimpleAtod(parts[2], &out.b_))) {
    return InvalidArgument("length '{}': not N, uniform:LOW:HIGH, normal:MEAN:STDDEV or lognormal:MEDIAN:SIGMA", text);
  }
  if (!(out.a_ >= 1) || !(out.b_ >= 0) || out.a_ > kMaxLength || out.b_ > kMaxLength) {
    return InvalidArgument("length '{}': the first number must be 1 to {}, the second 0 to {}", text, kMaxLength,
                           kMaxLength);
  }
  if (out.kind_ == Kind::kUniform && out.b_ < out.a_) return InvalidArgument("length '{}': HIGH is below LOW", text);
  return out;
}

int LengthDistribution::Draw(std::mt19937_64& random) const {
  double value = a_;
  if (kind_ == Kind::kUniform) {
    value = static_cast<double>(std::uniform_int_distribution<int>(static_cast<int>(a_), static_cast<int>(b_))(random));
  } else if (kind_ == Kind::kNormal && b_ > 0) {
    value = std::normal_distribution<double>(a_, b_)(random);
  } else if (kind_ == Kind::kLognormal && b_ > 0) {
    value = std::lognormal_distribution<double>(std::log(a_), b_)(random);
  }
  return static_cast<int>(std::lround(std::clamp(value, 1.0, static_cast<double>(kMaxLength))));
}

absl::StatusOr<RequestSource> RandomWorkload(const WorkloadOptions& options) {
  ASSIGN_OR_RETURN(const LengthDistribution input, LengthDistribution::Parse(options.input_length));
  ASSIGN_OR_RETURN(const LengthDistribution output, LengthDistribution::Parse(options.output_length));
  std::mt19937_64 random(options.seed);
  std::vector<std::vector<int32_t>> prefixes(options.prefix_length > 0 ? options.num_prefixes : 0);
  for (auto& prefix : prefixes) AppendRandom(options.prefix_length, options.vocab_size, random, prefix);
  return [input, output, random, prefixes = std::move(prefixes), count = options.count, vocab_size = options.vocab_size,
          next = int64_t{0}]() mutable -> std::optional<PlannedRequest> {
    if (next == count) return std::nullopt;
    PlannedRequest request;
    if (!prefixes.empty()) request.prompt = prefixes[static_cast<size_t>(next) % prefixes.size()];
    AppendRandom(input.Draw(random), vocab_size, random, request.prompt);
    request.output_tokens = output.Draw(random);
    ++next;
    return request;
  };
}

absl::StatusOr<RequestSource> TraceWorkload(const std::string& path, const WorkloadOptions& options, double speed) {
  std::ifstream file(path);
  if (!file) return NotFound("--trace: cannot open '{}'", path);
  std::vector<PlannedRequest> requests;
  std::mt19937_64 random(options.seed);
  std::string line;
  for (int number = 1; static_cast<int64_t>(requests.size()) < options.count && std::getline(file, line); ++number) {
    if (line.find_first_not_of(" \t\r") == std::string::npos) continue;
    const Json object = Json::parse(line, nullptr, /*allow_exceptions=*/false);
    const auto number_of = [&](const char* key) -> double {
      return object.is_object() && object.contains(key) && object[key].is_number() ? object[key].get<double>() : -1;
    };
    const double at_ms = number_of("timestamp"), input = number_of("input_length"), output = number_of("output_length");
    if (at_ms < 0 || input < 1 || output < 1 || input > kMaxLength || output > kMaxLength) {
      return InvalidArgument("{}:{}: needs timestamp (>= 0), input_length and output_length (1 to {})", path, number,
                             kMaxLength);
    }
    PlannedRequest request;
    request.output_tokens = static_cast<int>(output);
    request.at_ns = static_cast<int64_t>(at_ms * 1e6 / speed);
    const size_t length = static_cast<size_t>(input);
    if (object.contains("hash_ids") && object["hash_ids"].is_array()) {
      for (const auto& hash : object["hash_ids"]) {
        if (!hash.is_number_integer()) return InvalidArgument("{}:{}: hash_ids holds {}", path, number, hash.dump());
        std::mt19937_64 block(options.seed ^ (hash.get<uint64_t>() * 0x9e3779b97f4a7c15ULL));
        if (request.prompt.size() < length) AppendRandom(kTraceBlock, options.vocab_size, block, request.prompt);
      }
    }
    if (request.prompt.size() > length) request.prompt.resize(length);
    AppendRandom(static_cast<int>(length - request.prompt.size()), options.vocab_size, random, request.prompt);
    requests.push_back(std::move(request));
  }
  if (requests.empty()) return InvalidArgument("{}: no request in it", path);
  std::ranges::stable_sort(requests, {}, &PlannedRequest::at_ns);
  return FromVector(std::move(requests));
}

absl::StatusOr<RequestSource> DatasetWorkload(
    const std::string& path, int64_t count,
    const std::function<absl::StatusOr<int>(const std::string& text)>& count_tokens) {
  std::ifstream file(path);
  if (!file) return NotFound("--dataset: cannot open '{}'", path);
  std::vector<PlannedRequest> requests;
  const auto add = [&](const Json& object) -> absl::Status {
    ASSIGN_OR_RETURN(std::optional<PlannedRequest> request, FromObject(object, count_tokens));
    if (request) requests.push_back(std::move(*request));
    return absl::OkStatus();
  };
  const auto full = [&] { return static_cast<int64_t>(requests.size()) >= count; };
  if ((file >> std::ws).peek() == '[') {
    const Json array = Json::parse(file, nullptr, /*allow_exceptions=*/false);
    if (array.is_discarded()) return InvalidArgument("{}: begins with '[' and is not a JSON array", path);
    for (size_t i = 0; i < array.size() && !full(); ++i) RETURN_IF_ERROR(add(array[i]));
  } else {
    std::string line;
    for (int number = 1; !full() && std::getline(file, line); ++number) {
      if (line.find_first_not_of(" \t\r") == std::string::npos) continue;
      const Json object = Json::parse(line, nullptr, /*allow_exceptions=*/false);
      if (object.is_discarded()) return InvalidArgument("{}:{}: not a JSON object", path, number);
      RETURN_IF_ERROR(add(object));
    }
  }
  if (requests.empty()) {
    return InvalidArgument("{}: no object with a prompt and an answer (see docs/bench.md: datasets)", path);
  }
  return FromVector(std::move(requests));
}

RequestSource SpreadArrivals(RequestSource source, const Profile& rate_per_s, double burstiness, uint64_t seed) {
  std::mt19937_64 random(seed ^ 0x6a09e667f3bcc908ULL);  // other draws than the prompts'
  std::gamma_distribution<double> gap(burstiness, 1 / burstiness);
  return
      [source = std::move(source), rate_per_s, random, gap, expected = 0.0]() mutable -> std::optional<PlannedRequest> {
        expected += gap(random);
        const std::optional<double> at_s = rate_per_s.TimeOfArea(expected);
        if (!at_s) return std::nullopt;
        std::optional<PlannedRequest> request = source();
        if (request) request->at_ns = static_cast<int64_t>(*at_s * 1e9);
        return request;
      };
}

std::vector<PlannedRequest> TakeAll(const RequestSource& source) {
  std::vector<PlannedRequest> out;
  while (std::optional<PlannedRequest> request = source()) out.push_back(std::move(*request));
  return out;
}

}  // namespace soloist::cli
