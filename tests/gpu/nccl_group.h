// One rank of a group of processes that talk over NCCL, for the tests: its flags, its device, a store in a folder.
#ifndef SOLOIST_TESTS_GPU_NCCL_GROUP_H_
#define SOLOIST_TESTS_GPU_NCCL_GROUP_H_

#include <algorithm>
#include <cstdint>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "absl/time/clock.h"
#include "engine/comm/bootstrap.h"
#include "engine/comm/nccl_communicator.h"
#include "tests/comm/comm_group.h"

namespace soloist {

struct NcclTestFlags {
  int rank = 0;          // --rank=N
  int size = 1;          // --size=N
  std::string store;     // --store=DIR, the same for all ranks and empty at the start
  int seed = 1;          // --seed=N, the same for all ranks
  int limit_s = 60;      // --limit_s=N: the process ends by then, whatever happens
  std::string location;  // --device=cuda
};
NcclTestFlags& NcclFlags();

// Keys of one communicator as files of a folder; `name` tells communicators apart.
class FileStore final : public BootstrapStore {
 public:
  explicit FileStore(std::string name) : prefix_(NcclFlags().store + "/" + std::move(name) + ".") {}
  absl::Status Set(const std::string& key, const std::string& value) override;
  absl::StatusOr<std::string> Get(const std::string& key, absl::Duration timeout) override;

  // Says that this rank has come to `point` and waits for the first `ranks` ranks to have.
  absl::Status Meet(const std::string& point, int ranks, absl::Duration timeout = absl::Seconds(40));

 private:
  std::string PathOf(const std::string& key) const;
  const std::string prefix_;
};

// This process's rank with a communicator. CHECK-fails if it cannot be made.
TestRank MakeNcclRank(FileStore& store, absl::Duration timeout);
// A rank without one yet.
TestRank MakeBareRank();

// What became of an enqueued call: its own status, that of the stream, that of the communicator.
inline absl::Status Outcome(TestRank& rank, const absl::Status& enqueued) {
  absl::Status status = rank.Finish(enqueued);
  if (status.ok()) status = rank.comm->error();
  return status;
}

// A byte that tells the sender, the receiver, the place and the round apart.
inline std::vector<uint8_t> Pattern(int64_t round, int from, int to, int64_t bytes) {
  std::mt19937_64 random(static_cast<uint64_t>(NcclFlags().seed * 7919 + round * 1048573 + from * 1021 + to));
  std::vector<uint8_t> out(static_cast<size_t>(bytes));
  for (int64_t i = 0; i < bytes; i += 8) {
    const uint64_t bits = random();
    for (int64_t j = i; j < std::min(i + 8, bytes); ++j) out[j] = static_cast<uint8_t>(bits >> (8 * (j - i)));
  }
  return out;
}

inline void Append(std::vector<uint8_t>& to, const std::vector<uint8_t>& from) {
  to.insert(to.end(), from.begin(), from.end());
}

}  // namespace soloist

#endif  // SOLOIST_TESTS_GPU_NCCL_GROUP_H_
