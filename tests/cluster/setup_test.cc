// Wrong set-ups: each ends within the timeout, and one sentence names the rank (or worker) and the cause.
#include <unistd.h>

#include <filesystem>
#include <fstream>
#include <functional>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "engine/cluster/cluster_engine.h"
#include "engine/cluster/wire.h"
#include "engine/model/config.h"
#include "engine/model/footprint.h"
#include "gmock/gmock.h"
#include "grpcpp/create_channel.h"
#include "gtest/gtest.h"
#include "proto/worker.grpc.pb.h"
#include "tests/cluster/comm_wrapper.h"
#include "tests/cluster/fake_worker.h"
#include "tests/cluster/thread_cluster.h"

namespace soloist {
namespace {

using testing::AllOf;
using testing::HasSubstr;

constexpr char kModelDir[] = "models/tiny";
constexpr int kRanks = 3;

// How a start that should fail has ended.
struct Failed {
  absl::Status leader;
  std::vector<absl::Status> workers;
  absl::Duration took;
};

struct Attempt {
  ThreadWorkers workers;
  ClusterOptions options{.engine = {.model_dir = kModelDir,
                                    .num_ranks = kRanks,
                                    .max_model_len = 128,
                                    .max_tokens_per_step = 64,
                                    .max_sequences = 16,
                                    .num_blocks = 64},
                         .version = kTestVersion,
                         .start_timeout = absl::Seconds(2)};
  // Starts the workers; by default all ranks, as they should be.
  std::function<void(const std::string& leader)> start = [this](const std::string& leader) {
    workers.StartAll(leader, kRanks);
  };

  Failed Run() {
    options.on_listening = [this](const std::string& leader) {
      start(leader);
      return absl::OkStatus();
    };
    const absl::Time begin = absl::Now();
    auto engine = CreateClusterEngine(options, Clock::Real(), nullptr);
    Failed failed{.leader = engine.status(), .workers = {}, .took = absl::Now() - begin};
    engine = absl::UnknownError("gone");
    failed.workers = workers.Join();
    return failed;
  }
};

void ExpectSentence(const absl::Status& status, absl::StatusCode code, const testing::Matcher<std::string>& message) {
  EXPECT_EQ(status.code(), code) << status.ToString();
  EXPECT_THAT(std::string(status.message()), message);
  EXPECT_THAT(std::string(status.message()), testing::Not(HasSubstr("\n")));
  std::printf("  %s\n", status.ToString().c_str());
}

class SetUpTest : public testing::Test {
 protected:
  Attempt set_up_;
};

TEST_F(SetUpTest, TheRightOneStarts) { EXPECT_EQ(set_up_.Run().leader, absl::OkStatus()); }

TEST_F(SetUpTest, MissingRank) {
  set_up_.start = [&](const std::string& leader) { set_up_.workers.StartAll(leader, kRanks - 1); };
  const Failed failed = set_up_.Run();
  ExpectSentence(failed.leader, absl::StatusCode::kDeadlineExceeded,
                 AllOf(HasSubstr("after 2s"), HasSubstr("no worker has joined as rank 2")));
  EXPECT_LT(failed.took, absl::Seconds(4));
  for (const absl::Status& worker : failed.workers)
    EXPECT_THAT(worker.message(), HasSubstr("no worker has joined as rank 2"));
}

TEST_F(SetUpTest, TwoRanksAlike) {
  set_up_.start = [&](const std::string& leader) {
    for (const int rank : {0, 1, 1}) set_up_.workers.Start(set_up_.workers.Options(leader, rank));
  };
  const Failed failed = set_up_.Run();
  ExpectSentence(failed.leader, absl::StatusCode::kDeadlineExceeded,
                 AllOf(HasSubstr("no worker has joined as rank 2"), HasSubstr("wants rank 1, which pid")));
  int refused = 0;
  for (const absl::Status& worker : failed.workers) {
    if (!absl::IsAlreadyExists(worker)) continue;
    ++refused;
    ExpectSentence(worker, absl::StatusCode::kAlreadyExists, HasSubstr("wants rank 1, which pid"));
  }
  EXPECT_EQ(refused, 1);
}

TEST_F(SetUpTest, RankBeyondTheLast) {
  set_up_.start = [&](const std::string& leader) { set_up_.workers.Start(set_up_.workers.Options(leader, kRanks)); };
  const Failed failed = set_up_.Run();
  ExpectSentence(failed.workers[0], absl::StatusCode::kOutOfRange, HasSubstr("wants rank 3, allowed: 0 to 2"));
}

TEST_F(SetUpTest, OneWorkerTooMany) {
  set_up_.start = [&](const std::string& leader) {
    for (int i = 0; i <= kRanks; ++i) {
      WorkerProcessOptions options = set_up_.workers.Options(leader, -1);
      options.make_comm = [](int, int, BootstrapStore&, Device&, absl::Duration) {
        return absl::UnavailableError("no group in this test");
      };
      set_up_.workers.Start(options);
    }
  };
  const Failed failed = set_up_.Run();
  EXPECT_EQ(std::ranges::count_if(failed.workers, [](const auto& s) { return absl::IsResourceExhausted(s); }), 1);
  for (const absl::Status& worker : failed.workers) {
    if (absl::IsResourceExhausted(worker)) ExpectSentence(worker, worker.code(), HasSubstr("is one too many"));
  }
}

TEST_F(SetUpTest, AnotherGroupSize) {
  set_up_.start = [&](const std::string& leader) {
    WorkerProcessOptions options = set_up_.workers.Options(leader, 0);
    options.group_size = 8;
    set_up_.workers.Start(options);
  };
  ExpectSentence(set_up_.Run().workers[0], absl::StatusCode::kFailedPrecondition,
                 HasSubstr("has group size '8', the leader '3'"));
}

TEST_F(SetUpTest, AnotherVersion) {
  set_up_.start = [&](const std::string& leader) {
    WorkerProcessOptions options = set_up_.workers.Options(leader, 1);
    options.version = "0.0.9";
    set_up_.workers.Start(options);
  };
  const Failed failed = set_up_.Run();
  ExpectSentence(failed.workers[0], absl::StatusCode::kFailedPrecondition,
                 HasSubstr("has version '0.0.9', the leader 'test'"));
  ExpectSentence(failed.leader, absl::StatusCode::kDeadlineExceeded, HasSubstr("refused: pid"));
}

TEST_F(SetUpTest, DeterministicOnOneSideOnly) {
  set_up_.start = [&](const std::string& leader) {
    WorkerProcessOptions options = set_up_.workers.Options(leader, 1);
    options.device.deterministic = true;
    set_up_.workers.Start(options);
  };
  ExpectSentence(set_up_.Run().workers[0], absl::StatusCode::kFailedPrecondition, HasSubstr("--deterministic"));
}

TEST_F(SetUpTest, AnotherCpuGemm) {
  set_up_.start = [&](const std::string& leader) {
    WorkerProcessOptions options = set_up_.workers.Options(leader, 1);
    options.device.cpu_gemm = "fma";
    set_up_.workers.Start(options);
  };
  ExpectSentence(set_up_.Run().workers[0], absl::StatusCode::kFailedPrecondition,
                 HasSubstr("has --cpu-gemm 'fma', the leader 'auto'"));
}

TEST_F(SetUpTest, AnotherBuildSchemaOrDevice) {
  absl::Status build, schema, device, right;
  set_up_.start = [&](const std::string& leader) {
    build = SayHello(leader, [](worker::v1::Hello& hello) { hello.set_build_id("0123456789abcdef"); });
    schema = SayHello(leader, [](worker::v1::Hello& hello) { hello.set_schema_revision(kWorkerSchemaRevision + 1); });
    device = SayHello(leader, [](worker::v1::Hello& hello) { hello.set_device_kind("cuda"); });
    right = SayHello(leader, [](worker::v1::Hello&) {});
  };
  const Failed failed = set_up_.Run();
  ExpectSentence(build, absl::StatusCode::kFailedPrecondition, HasSubstr("has build '0123456789abcdef', the leader"));
  ExpectSentence(schema, absl::StatusCode::kFailedPrecondition, HasSubstr("has schema revision"));
  ExpectSentence(device, absl::StatusCode::kFailedPrecondition, HasSubstr("has device 'cuda', the leader 'cpu'"));
  EXPECT_EQ(right, absl::OkStatus());
  // The one that was right, and then went away.
  EXPECT_THAT(failed.leader.message(), HasSubstr("its stream to the leader has broken"));
}

// Of two CPUs that would compute other bits.
TEST_F(SetUpTest, AnotherKindOfCpu) {
  absl::Status first, second;
  set_up_.start = [&](const std::string& leader) {
    Caller stays(leader);
    first = stays.Say([](worker::v1::Hello& hello) { hello.set_device_name("cpu (amx)"); });
    second = SayHello(leader, [](worker::v1::Hello& hello) { hello.set_device_name("cpu (fma)"); });
  };
  set_up_.Run();
  EXPECT_EQ(first, absl::OkStatus());
  ExpectSentence(second, absl::StatusCode::kFailedPrecondition,
                 AllOf(HasSubstr("computes on 'cpu (fma)'"), HasSubstr("on 'cpu (amx)'"), HasSubstr("--cpu-gemm")));
}

// A copy of the bundled model, with something changed.
class ModelCopy {
 public:
  explicit ModelCopy(const std::function<void(const std::filesystem::path&)>& change)
      : path_(std::filesystem::path(testing::TempDir()) / ("model" + std::to_string(getpid()))) {
    std::filesystem::copy(kModelDir, path_, std::filesystem::copy_options::recursive);
    for (const auto& entry : std::filesystem::directory_iterator(path_)) {
      std::filesystem::permissions(entry.path(), std::filesystem::perms::owner_write,
                                   std::filesystem::perm_options::add);
    }
    change(path_);
  }
  ~ModelCopy() { std::filesystem::remove_all(path_); }
  ModelCopy(const ModelCopy&) = delete;
  ModelCopy& operator=(const ModelCopy&) = delete;
  std::string path() const { return path_.string(); }

 private:
  const std::filesystem::path path_;
};

Failed RunWithModelOfRank1(Attempt& set_up, const ModelCopy& model) {
  set_up.start = [&](const std::string& leader) {
    for (int r = 0; r < kRanks; ++r) {
      WorkerProcessOptions options = set_up.workers.Options(leader, r);
      if (r == 1) options.model_dir = model.path();
      set_up.workers.Start(options);
    }
  };
  return set_up.Run();
}

TEST_F(SetUpTest, AnotherConfig) {
  const ModelCopy model(
      [](const std::filesystem::path& dir) { std::ofstream(dir / "config.json", std::ios::app) << "\n"; });
  const Failed failed = RunWithModelOfRank1(set_up_, model);
  ExpectSentence(failed.workers[1], absl::StatusCode::kFailedPrecondition,
                 AllOf(HasSubstr("rank 1"), HasSubstr("has another config.json")));
}

TEST_F(SetUpTest, AnotherCheckpoint) {
  // The same tensors under another shard's name, so that only the check can see it.
  const ModelCopy model([](const std::filesystem::path& dir) {
    for (const auto& entry : std::filesystem::directory_iterator(dir)) {
      if (entry.path().extension() != ".safetensors") continue;
      // Blanks in the header are no change to its meaning.
      std::ifstream in(entry.path(), std::ios::binary);
      std::string bytes((std::istreambuf_iterator<char>(in)), std::istreambuf_iterator<char>());
      uint64_t header = 0;
      std::memcpy(&header, bytes.data(), 8);
      bytes.insert(8 + header, "        ");
      header += 8;
      std::memcpy(bytes.data(), &header, 8);
      std::ofstream(entry.path(), std::ios::binary) << bytes;
      return;
    }
  });
  const Failed failed = RunWithModelOfRank1(set_up_, model);
  ExpectSentence(failed.workers[1], absl::StatusCode::kFailedPrecondition,
                 AllOf(HasSubstr("rank 1"), HasSubstr("has another checkpoint")));
  ExpectSentence(failed.leader, absl::StatusCode::kDeadlineExceeded, HasSubstr("rank 1"));
}

TEST_F(SetUpTest, NoModelOnOneHost) {
  set_up_.start = [&](const std::string& leader) {
    for (int r = 0; r < kRanks; ++r) {
      WorkerProcessOptions options = set_up_.workers.Options(leader, r);
      if (r == 2) options.model_dir = "/nowhere";
      set_up_.workers.Start(options);
    }
  };
  const Failed failed = set_up_.Run();
  ExpectSentence(failed.leader, absl::StatusCode::kNotFound, AllOf(HasSubstr("rank 2"), HasSubstr("/nowhere")));
  EXPECT_LT(failed.took, absl::Seconds(2));
}

TEST_F(SetUpTest, TooLittleMemory) {
  set_up_.options.engine.num_blocks = 100'000'000;
  const Failed failed = set_up_.Run();
  ExpectSentence(failed.leader, absl::StatusCode::kResourceExhausted,
                 AllOf(HasSubstr("has no room: 100000000 KV blocks need 9830400000000 bytes"), HasSubstr("are free")));
  EXPECT_LT(failed.took, absl::Seconds(2));
}

TEST_F(SetUpTest, NoLeader) {
  WorkerProcessOptions options = set_up_.workers.Options("127.0.0.1:1", 0);
  options.leader_timeout = absl::Seconds(1);
  const absl::Time begin = absl::Now();
  ExpectSentence(RunWorkerProcess(options), absl::StatusCode::kUnavailable,
                 HasSubstr("no leader at 127.0.0.1:1 for 1s"));
  EXPECT_LT(absl::Now() - begin, absl::Seconds(4));
}

TEST_F(SetUpTest, AddressThatIsTaken) {
  ThreadWorkers others;
  set_up_.start = [&](const std::string& leader) {
    ClusterOptions second = set_up_.options;
    second.address = leader;
    second.on_listening = nullptr;
    ExpectSentence(CreateClusterEngine(second, Clock::Real(), nullptr).status(), absl::StatusCode::kUnavailable,
                   HasSubstr("cannot listen for workers at " + leader));
    set_up_.workers.StartAll(leader, kRanks);
  };
  EXPECT_EQ(set_up_.Run().leader, absl::OkStatus());
}

TEST_F(SetUpTest, PeersThatCannotBeReached) {
  set_up_.start = [&](const std::string& leader) {
    for (int r = 0; r < kRanks; ++r) {
      WorkerProcessOptions options = set_up_.workers.Options(leader, r);
      options.make_comm = [](int rank, int, BootstrapStore& store, Device&,
                             absl::Duration) -> absl::StatusOr<std::unique_ptr<Communicator>> {
        if (rank == 1) return absl::UnavailableError("rank 0 at 192.0.2.1:4000 does not answer");
        const auto never = store.Get("never", absl::Seconds(20));
        return never.status();
      };
      set_up_.workers.Start(options);
    }
  };
  const Failed failed = set_up_.Run();
  ExpectSentence(failed.leader, absl::StatusCode::kUnavailable,
                 AllOf(HasSubstr("rank 1"), HasSubstr("rank 0 at 192.0.2.1:4000 does not answer")));
}

TEST_F(SetUpTest, CollectivesThatBringWrongBytes) {
  set_up_.start = [&](const std::string& leader) {
    for (int r = 0; r < kRanks; ++r) {
      WorkerProcessOptions options = set_up_.workers.Options(leader, r);
      if (r == 1) {
        options.make_comm = Wrapped(options.make_comm, {.after_all_to_all = [](void* recv, int64_t bytes_per_rank) {
                                      static_cast<char*>(recv)[2 * bytes_per_rank + 5] ^= 1;
                                    }});
      }
      set_up_.workers.Start(options);
    }
  };
  ExpectSentence(set_up_.Run().leader, absl::StatusCode::kDataLoss,
                 AllOf(HasSubstr("rank 1"), HasSubstr("wrong bytes from rank 2: byte 5 of 4096")));
}

TEST_F(SetUpTest, TransportSlowerThanRequired) {
  set_up_.options.require_transport = "ib";
  set_up_.start = [&](const std::string& leader) {
    for (int r = 0; r < kRanks; ++r) {
      WorkerProcessOptions options = set_up_.workers.Options(leader, r);
      if (r == 2) options.make_comm = Wrapped(options.make_comm, {.transport = "socket"});
      set_up_.workers.Start(options);
    }
  };
  ExpectSentence(set_up_.Run().leader, absl::StatusCode::kFailedPrecondition,
                 AllOf(HasSubstr("rank 2"), HasSubstr("over socket, slower than the required ib")));
}

TEST_F(SetUpTest, MoreWorkersThanExperts) {
  set_up_.options.engine.num_ranks = 17;
  ExpectSentence(set_up_.Run().leader, absl::StatusCode::kInvalidArgument, HasSubstr("17"));
}

// Rank 1 of two goes, and rank 0 has memory for its eight experts or has not: then all wait for another one.
TEST(Shrinking, OnlyWhereThereIsMemory) {
  const int64_t expert_bytes = ExpertWeightBytes(LoadModelConfig(kModelDir).value(), 1);
  for (const bool fits : {false, true}) {
    Attempt set_up;
    set_up.options.engine.num_ranks = 2;
    set_up.options.silence_timeout = absl::Seconds(60);
    set_up.options.on_loss = OnLoss::kShrink;
    set_up.options.replace_timeout = absl::Milliseconds(50);
    std::unique_ptr<FakeWorker> stays, goes;
    set_up.options.on_listening = [&](const std::string& leader) {
      stays = std::make_unique<FakeWorker>(leader, kModelDir, 0, 8 * expert_bytes - (fits ? 0 : 1));
      goes = std::make_unique<FakeWorker>(leader, kModelDir, 1, 0);
      return absl::OkStatus();
    };
    auto engine = CreateClusterEngine(set_up.options, Clock::Real(), nullptr);
    ASSERT_EQ(engine.status(), absl::OkStatus());
    goes->Vanish();
    const StepPlan plan{.step = 1, .homes = std::vector<HomePlan>(2, HomePlan(HomePlanParts{}, 1, 0, 0))};
    absl::Status lost = (*engine)->Submit(plan);
    if (lost.ok()) lost = (*engine)->Await().status();
    EXPECT_TRUE(absl::IsUnavailable(lost)) << lost.ToString();
    auto recovery = (*engine)->Recover(absl::Milliseconds(fits ? 20000 : 500));
    if (!fits) {
      ExpectSentence(
          recovery.status(), absl::StatusCode::kDeadlineExceeded,
          HasSubstr("cannot take its experts: rank 0: 8 more experts need " + std::to_string(8 * expert_bytes) +
                    " bytes, " + std::to_string(8 * expert_bytes - 1) + " are free"));
      goes = std::make_unique<FakeWorker>((*engine)->address(), kModelDir, 1, 0);
      recovery = (*engine)->Recover(absl::Seconds(20));
    }
    ASSERT_EQ(recovery.status(), absl::OkStatus());
    EXPECT_EQ(recovery->home_kept, (std::vector<bool>{true, false}));
    EXPECT_EQ(recovery->home_usable, (std::vector<bool>{true, !fits}));
  }
}

}  // namespace
}  // namespace soloist
