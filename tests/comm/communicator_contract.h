// The contract of Communicator as one parameterised suite, for any implementation: link :communicator_contract and
// write
//   INSTANTIATE_TEST_SUITE_P(Nccl, CommunicatorContract, testing::Values(CommBackend{...}), CommBackendName);
// The tests are in collectives_contract.cc (what arrives), sequences_contract.cc (random sequences) and
// failure_contract.cc (late, missing, leaving and aborting ranks).
#ifndef SOLOIST_TESTS_COMM_COMMUNICATOR_CONTRACT_H_
#define SOLOIST_TESTS_COMM_COMMUNICATOR_CONTRACT_H_

#include <cstdint>
#include <functional>
#include <ostream>
#include <string>
#include <vector>

#include "gtest/gtest.h"
#include "tests/comm/comm_group.h"

namespace soloist {

struct CommBackend {
  std::string name;  // letters and digits
  int size = 1;      // ranks
  // Calls return before the peers have come. A CPU stream runs each call to its end instead.
  bool asynchronous = false;
  std::function<TestGroup(int size, const CommOptions& options)> make;
};

inline std::string CommBackendName(const testing::TestParamInfo<CommBackend>& info) {
  return info.param.name + std::to_string(info.param.size);
}
inline void PrintTo(const CommBackend& backend, std::ostream* out) { *out << backend.name << backend.size; }

class CommunicatorContract : public testing::TestWithParam<CommBackend> {
 protected:
  // Far longer than any test takes: a test that hangs ends with an error instead.
  static constexpr absl::Duration kLong = absl::Seconds(40);

  int size() const { return GetParam().size; }
  // How often what is random is tried: a round of many ranks costs more, and has more places at once where it may fail.
  int Rounds(int of_few_ranks, int of_many) const { return size() <= 4 ? of_few_ranks : of_many; }
  TestGroup Make(absl::Duration timeout = kLong) const { return GetParam().make(size(), {.timeout = timeout}); }
};

// A byte that tells the sender, the receiver, the place and the round apart.
inline uint8_t PatternByte(uint64_t round, int from, int to, int64_t i) {
  uint64_t x = (round * 131 + static_cast<uint64_t>(from)) * 257 + static_cast<uint64_t>(to) + 1;
  x = (x * 0x9E3779B97F4A7C15u) ^ (static_cast<uint64_t>(i) * 0xC2B2AE3D27D4EB4Fu);
  x ^= x >> 29;
  return static_cast<uint8_t>(x * 0xBF58476D1CE4E5B9u >> 56);
}

inline std::vector<uint8_t> PatternBytes(uint64_t round, int from, int to, int64_t bytes) {
  std::vector<uint8_t> out(static_cast<size_t>(bytes));
  for (int64_t i = 0; i < bytes; ++i) out[i] = PatternByte(round, from, to, i);
  return out;
}

inline void Append(std::vector<uint8_t>& to, const std::vector<uint8_t>& from) {
  to.insert(to.end(), from.begin(), from.end());
}

}  // namespace soloist

#endif  // SOLOIST_TESTS_COMM_COMMUNICATOR_CONTRACT_H_
