// Ranks over TCP that are processes of their own: killed, stopped, aborting and leaving in the middle of collectives.
//
// The test starts copies of this binary ("--rank ..."), each a rank that runs collectives until they fail. They meet in
// a folder, and each writes how it ended, and when, to a file there.
#include <dirent.h>
#include <signal.h>
#include <spawn.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <memory>
#include <random>
#include <set>
#include <sstream>
#include <string>
#include <thread>
#include <vector>

#include "absl/strings/match.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "base/clock.h"
#include "gtest/gtest.h"
#include "tests/comm/gloo_group.h"

extern char** environ;

namespace soloist {
namespace {

bool ReadFile(const std::string& path, std::string* out) {
  std::ifstream file(path);
  if (!file) return false;
  std::stringstream text;
  text << file.rdbuf();
  *out = text.str();
  return true;
}

// Nobody sees it half written.
void WriteFile(const std::string& path, const std::string& text) {
  const std::string scratch = absl::StrCat(path, ".", getpid());
  std::ofstream(scratch) << text;
  CHECK_EQ(rename(scratch.c_str(), path.c_str()), 0);
}

class FolderStore final : public BootstrapStore {
 public:
  explicit FolderStore(std::string folder) : folder_(std::move(folder)) {}
  absl::Status Set(const std::string& key, const std::string& value) override {
    WriteFile(Path(key), value);
    return absl::OkStatus();
  }
  absl::StatusOr<std::string> Get(const std::string& key, absl::Duration timeout) override {
    const absl::Time deadline = absl::Now() + timeout;
    while (true) {
      std::string value;
      if (ReadFile(Path(key), &value)) return value;
      if (absl::Now() >= deadline) return absl::DeadlineExceededError(absl::StrCat("nobody has set ", key));
      absl::SleepFor(absl::Milliseconds(1));
    }
  }

 private:
  std::string Path(std::string key) const {
    for (char& c : key) c = c == '/' ? '_' : c;
    return absl::StrCat(folder_, "/key_", key);
  }
  const std::string folder_;
};

// What a rank is told. Its fields travel as command line arguments, in this order.
struct RankTask {
  std::string folder;
  int rank = 0, size = 0;
  int64_t bytes = 0, gloo_min_bytes = 0;
  int timeout_ms = 0;
  int abort_rank = -1;  // aborts after abort_call calls
  int abort_call = 0;
  int calls = 0;  // after so many the rank leaves; 0: never
};

absl::Status Call(TestRank& rank, int k, const RankTask& task, const Buffer& send, const Buffer& recv) {
  std::vector<int64_t> sizes(task.size), offsets(task.size);
  for (int r = 0; r < task.size; ++r) {
    offsets[r] = task.bytes * r;
    sizes[r] = task.bytes / (1 + (k + r + task.rank) % 3);
  }
  switch (k % 5) {
    case 0:
      return rank.comm->AllToAll(send.data(), recv.data(), task.bytes, *rank.stream);
    case 1:
      return rank.comm->AllToAllV(send.data(), sizes, offsets, recv.data(), sizes, offsets, *rank.stream);
    case 2:
      return rank.comm->AllReduceSum(static_cast<float*>(recv.data()), task.bytes / 4, *rank.stream);
    case 3:
      return rank.comm->Broadcast(recv.data(), task.bytes, k % task.size, *rank.stream);
    default:
      return rank.comm->Barrier(*rank.stream);
  }
}

int RunRank(const RankTask& task) {
  TestGroup group = CpuGroup(1);
  TestRank& rank = group.ranks[0];
  FolderStore store(task.folder);
  absl::StatusOr<std::unique_ptr<Communicator>> comm =
      CreateGlooCommunicator(task.rank, task.size, store, *rank.device,
                             {.comm = {.timeout = absl::Milliseconds(task.timeout_ms)},
                              .hostname_or_address = "127.0.0.1",
                              .gloo_min_bytes = task.gloo_min_bytes});
  absl::Status status = comm.status();
  if (status.ok()) {
    rank.comm = *std::move(comm);
    const Buffer send = rank.Filled(task.bytes * task.size, 0), recv = rank.Filled(task.bytes * task.size, 0);
    for (int k = 0; status.ok() && (task.calls == 0 || k < task.calls); ++k) {
      if (k == 20) WriteFile(absl::StrCat(task.folder, "/running_", task.rank), "");
      if (task.rank == task.abort_rank && k == task.abort_call) {
        std::thread([&] { rank.comm->Abort(absl::DataLossError("rank says so")); }).join();
      }
      status = Call(rank, k, task, send, recv);
    }
  }
  WriteFile(
      absl::StrCat(task.folder, "/end_", task.rank),
      absl::StrCat(static_cast<int>(status.code()), " ", Clock::Real().NowNs(), " ", std::string(status.message())));
  return 0;
}

// How a rank ended.
struct End {
  absl::Status status;
  int64_t at_ns = 0;
};

class Processes {
 public:
  explicit Processes(RankTask task) : task_(std::move(task)) {
    char folder[] = "/tmp/gloo_process_test_XXXXXX";
    CHECK(mkdtemp(folder) != nullptr);
    task_.folder = folder;
    for (int r = 0; r < task_.size; ++r) Start(r);
  }
  ~Processes() {
    for (int r = 0; r < task_.size; ++r) {
      if (pids_[r] == 0) continue;
      kill(pids_[r], SIGKILL);
      waitpid(pids_[r], nullptr, 0);
    }
    if (DIR* folder = opendir(task_.folder.c_str())) {
      while (const dirent* entry = readdir(folder)) unlink(absl::StrCat(task_.folder, "/", entry->d_name).c_str());
      closedir(folder);
    }
    rmdir(task_.folder.c_str());
  }

  // Until every rank has been through some calls.
  void AwaitRunning() const {
    std::string text;
    for (int r = 0; r < task_.size; ++r) {
      while (!ReadFile(absl::StrCat(task_.folder, "/running_", r), &text)) {
        ASSERT_FALSE(ReadFile(absl::StrCat(task_.folder, "/end_", r), &text)) << "rank " << r << ": " << text;
        absl::SleepFor(absl::Milliseconds(1));
      }
    }
  }

  // When it was sent.
  int64_t Signal(int rank, int signal) const {
    CHECK_EQ(kill(pids_[rank], signal), 0);
    return Clock::Real().NowNs();
  }

  // Waits for the process.
  End Finish(int rank) {
    int exit_status = 0;
    CHECK_EQ(waitpid(pids_[rank], &exit_status, 0), pids_[rank]);
    pids_[rank] = 0;
    if (!WIFEXITED(exit_status)) return {absl::UnknownError(absl::StrCat("signal ", WTERMSIG(exit_status))), 0};
    std::string text;
    End end;
    int code = 0, used = 0;
    if (!ReadFile(absl::StrCat(task_.folder, "/end_", rank), &text) ||
        std::sscanf(text.c_str(), "%d %ld %n", &code, &end.at_ns, &used) != 2) {
      return {absl::UnknownError(absl::StrCat("no report: ", text)), 0};
    }
    end.status = absl::Status(static_cast<absl::StatusCode>(code), text.substr(used));
    return end;
  }

 private:
  void Start(int rank) {
    std::vector<std::string> words = {"/proc/self/exe", "--rank", task_.folder};
    for (const int64_t number :
         {int64_t{rank}, int64_t{task_.size}, task_.bytes, task_.gloo_min_bytes, int64_t{task_.timeout_ms},
          int64_t{task_.abort_rank}, int64_t{task_.abort_call}, int64_t{task_.calls}}) {
      words.push_back(absl::StrCat(number));
    }
    std::vector<char*> args;
    for (std::string& word : words) args.push_back(word.data());
    args.push_back(nullptr);
    pids_.push_back(0);
    CHECK_EQ(posix_spawn(&pids_.back(), "/proc/self/exe", nullptr, nullptr, args.data(), environ), 0);
  }

  RankTask task_;
  std::vector<pid_t> pids_;  // 0: it has ended
};

struct Shape {
  const char* name;
  int size;
  int64_t bytes, gloo_min_bytes;
  RankTask Task(int timeout_ms) const {
    return {.size = size, .bytes = bytes, .gloo_min_bytes = gloo_min_bytes, .timeout_ms = timeout_ms};
  }
};

class GlooProcessTest : public testing::TestWithParam<Shape> {};

// "rank 2 is gone", and of no other rank.
void ExpectGone(int rank, const absl::Status& status) {
  const std::string message(status.message());
  EXPECT_EQ(status.code(), absl::StatusCode::kUnavailable) << status;
  EXPECT_TRUE(absl::StartsWith(message, absl::StrCat("rank ", rank, " is gone: "))) << status;
  EXPECT_EQ(message.find("rank ", 1), std::string::npos) << status;
}

TEST_P(GlooProcessTest, AKilledRankIsNamedByAllOthersWithinTwoSeconds) {
  const int size = GetParam().size;
  std::mt19937 random(1);
  for (const int victim : {size - 1, 0, size / 2, 1}) {
    Processes processes(GetParam().Task(/*timeout_ms=*/30000));
    ASSERT_NO_FATAL_FAILURE(processes.AwaitRunning());
    absl::SleepFor(absl::Microseconds(random() % 20000));
    const int64_t killed_ns = processes.Signal(victim, SIGKILL);
    EXPECT_EQ(processes.Finish(victim).status.message(), "signal 9");
    for (int r = 0; r < size; ++r) {
      if (r == victim) continue;
      const End end = processes.Finish(r);
      ExpectGone(victim, end.status);
      EXPECT_LT(end.at_ns - killed_ns, 2'000'000'000) << "rank " << r;
    }
  }
}

// It is seen by the timeout; when the rank runs again it has the others' error.
TEST_P(GlooProcessTest, AStoppedRankIsNamedByTheDeadline) {
  const int size = GetParam().size, victim = size / 2;
  Processes processes(GetParam().Task(/*timeout_ms=*/1000));
  ASSERT_NO_FATAL_FAILURE(processes.AwaitRunning());
  const int64_t stopped_ns = processes.Signal(victim, SIGSTOP);
  std::set<std::string> messages;
  for (int r = 0; r < size; ++r) {
    if (r == victim) continue;
    const End end = processes.Finish(r);
    EXPECT_EQ(end.status.code(), absl::StatusCode::kDeadlineExceeded) << "rank " << r << ": " << end.status;
    EXPECT_TRUE(absl::StrContains(std::string(end.status.message()), absl::StrCat("rank ", victim))) << end.status;
    EXPECT_GT(end.at_ns - stopped_ns, 900'000'000) << "rank " << r;
    EXPECT_LT(end.at_ns - stopped_ns, 3'000'000'000) << "rank " << r;
    messages.insert(std::string(end.status.message()));
  }
  processes.Signal(victim, SIGCONT);
  const End end = processes.Finish(victim);
  EXPECT_EQ(end.status.code(), absl::StatusCode::kDeadlineExceeded) << end.status;
  messages.insert(std::string(end.status.message()));
  EXPECT_EQ(messages.size(), 1u) << "all ranks have the same error: " << testing::PrintToString(messages);
}

TEST_P(GlooProcessTest, AllRanksHaveTheReasonOfAnAbort) {
  const int size = GetParam().size;
  RankTask task = GetParam().Task(/*timeout_ms=*/30000);
  task.abort_rank = size - 1;
  task.abort_call = 37;
  Processes processes(task);
  for (int r = 0; r < size; ++r) EXPECT_EQ(processes.Finish(r).status, absl::DataLossError("rank says so"));
}

TEST_P(GlooProcessTest, RanksLeaveInGoodOrder) {
  RankTask task = GetParam().Task(/*timeout_ms=*/30000);
  for (int round = 0; round < 3; ++round) {
    task.calls = 21 + round;  // the last one is another operation each time
    Processes processes(task);
    for (int r = 0; r < task.size; ++r) EXPECT_EQ(processes.Finish(r).status, absl::OkStatus()) << "rank " << r;
  }
}

INSTANTIATE_TEST_SUITE_P(Loopback, GlooProcessTest,
                         testing::Values(Shape{"Small4", 4, 4096, GlooOptions::kNever},
                                         Shape{"Small8", 8, 4096, GlooOptions::kNever},
                                         Shape{"Large4", 4, 2 << 20, GlooOptions::kNever},
                                         Shape{"Gloo4", 4, 2 << 20, 64 << 10}, Shape{"GloosEveryByte3", 3, 4096, 1}),
                         [](const auto& info) { return std::string(info.param.name); });

}  // namespace
}  // namespace soloist

int main(int argc, char** argv) {
  if (argc == 11 && std::string(argv[1]) == "--rank") {
    int64_t numbers[8] = {};
    for (int i = 0; i < 8; ++i) CHECK(absl::SimpleAtoi(argv[3 + i], &numbers[i]));
    return soloist::RunRank({.folder = argv[2],
                             .rank = static_cast<int>(numbers[0]),
                             .size = static_cast<int>(numbers[1]),
                             .bytes = numbers[2],
                             .gloo_min_bytes = numbers[3],
                             .timeout_ms = static_cast<int>(numbers[4]),
                             .abort_rank = static_cast<int>(numbers[5]),
                             .abort_call = static_cast<int>(numbers[6]),
                             .calls = static_cast<int>(numbers[7])});
  }
  testing::InitGoogleTest(&argc, argv);
  return RUN_ALL_TESTS();
}
