// How ranks over TCP find each other: addresses, ports, strangers, and every way in which a rank may be missing.
#include <arpa/inet.h>
#include <netinet/in.h>
#include <sys/socket.h>
#include <unistd.h>

#include <functional>
#include <memory>
#include <set>
#include <thread>
#include <vector>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"
#include "absl/time/clock.h"
#include "gtest/gtest.h"
#include "tests/comm/gloo_group.h"

namespace soloist {
namespace {

using CommOrError = absl::StatusOr<std::unique_ptr<Communicator>>;

constexpr absl::Duration kSoon = absl::Seconds(15);

GlooOptions Loopback(absl::Duration connect_timeout = absl::Seconds(20)) {
  return {
      .comm = {.timeout = absl::Seconds(20)}, .hostname_or_address = "127.0.0.1", .connect_timeout = connect_timeout};
}

// What CreateGlooCommunicator gives each of `ranks` of `size`, all called at once.
std::vector<CommOrError> CreateAll(int size, const std::vector<int>& ranks, BootstrapStore& store, TestGroup& group,
                                   const std::function<GlooOptions(int)>& options) {
  std::vector<CommOrError> out(ranks.size());
  std::vector<std::thread> threads;
  for (size_t i = 0; i < ranks.size(); ++i) {
    threads.emplace_back(
        [&, i] { out[i] = CreateGlooCommunicator(ranks[i], size, store, *group.ranks[i].device, options(ranks[i])); });
  }
  for (std::thread& thread : threads) thread.join();
  return out;
}

// Connects the ranks and runs a collective.
void ExpectWorks(TestGroup& group, std::vector<CommOrError> comms) {
  for (size_t i = 0; i < comms.size(); ++i) {
    ASSERT_EQ(comms[i].status(), absl::OkStatus());
    group.ranks[i].comm = *std::move(comms[i]);
    EXPECT_EQ(group.ranks[i].comm->transport(), "tcp");
  }
  group.Run([](TestRank& rank) {
    const Buffer mine = rank.Filled(8, static_cast<uint8_t>(rank.id())), all = rank.Filled(8 * rank.size(), 99);
    ASSERT_EQ(rank.comm->AllGather(mine.data(), all.data(), 8, *rank.stream), absl::OkStatus());
    for (int r = 0; r < rank.size(); ++r) {
      EXPECT_EQ(rank.Download(static_cast<char*>(all.data()) + 8 * r, 8), std::vector<uint8_t>(8, r));
    }
  });
}

int PublishedPort(MemoryStore& store, int rank) {
  const std::vector<std::string> fields =
      absl::StrSplit(store.Get(absl::StrCat("comm/address/", rank), kSoon).value(), ' ');
  int port = 0;
  CHECK(absl::SimpleAtoi(fields.at(1), &port));
  return port;
}

// A connection to a port of this host, or -1.
int Connect(int port) {
  const int fd = socket(AF_INET, SOCK_STREAM, 0);
  sockaddr_in to{};
  to.sin_family = AF_INET;
  to.sin_port = htons(static_cast<uint16_t>(port));
  to.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  if (connect(fd, reinterpret_cast<const sockaddr*>(&to), sizeof(to)) == 0) return fd;
  close(fd);
  return -1;
}

TEST(GlooBootstrapTest, FindsItsOwnAddress) {
  for (const GlooOptions& options :
       {GlooOptions{}, GlooOptions{.interface = "lo"}, GlooOptions{.hostname_or_address = "localhost"},
        GlooOptions{.hostname_or_address = "127.0.0.1", .interface = "lo"}}) {
    MemoryStore store;
    TestGroup group = CpuGroup(3);
    ExpectWorks(group, CreateAll(3, {0, 1, 2}, store, group, [&](int) { return options; }));
  }
}

TEST(GlooBootstrapTest, AddressesThatAreNone) {
  TestGroup group = CpuGroup(1);
  MemoryStore store;
  GlooOptions options;
  options.interface = "nosuch0";
  const absl::Status no_interface = CreateGlooCommunicator(0, 1, store, *group.ranks[0].device, options).status();
  EXPECT_EQ(no_interface.code(), absl::StatusCode::kNotFound) << no_interface;
  EXPECT_NE(no_interface.message().find("nosuch0"), std::string::npos) << no_interface;
  options = {.hostname_or_address = "256.256.256.256"};
  const absl::Status no_host = CreateGlooCommunicator(0, 1, store, *group.ranks[0].device, options).status();
  EXPECT_EQ(no_host.code(), absl::StatusCode::kNotFound) << no_host;
  EXPECT_NE(no_host.message().find("256.256.256.256"), std::string::npos) << no_host;
}

TEST(GlooBootstrapTest, ListensInTheRangeOfPortsAndOnlyWhileItConnects) {
  // A free stretch: whoever has its middle has tried the others.
  for (const int begin : {21300, 22300, 23300, 24300}) {
    MemoryStore store;
    TestGroup group = CpuGroup(4);
    GlooOptions options = Loopback();
    options.port_begin = begin;
    options.port_end = begin + 3;
    options.gloo_min_bytes = 1;  // without effect beside a range
    std::vector<CommOrError> comms = CreateAll(4, {0, 1, 2, 3}, store, group, [&](int) { return options; });
    if (absl::IsDeadlineExceeded(comms[0].status()) || absl::IsResourceExhausted(comms[0].status())) continue;
    ExpectWorks(group, std::move(comms));
    std::set<int> ports;
    for (int r = 0; r < 4; ++r) ports.insert(PublishedPort(store, r));
    EXPECT_EQ(ports, (std::set<int>{begin, begin + 1, begin + 2, begin + 3}));
    for (const int port : ports) EXPECT_EQ(Connect(port), -1) << "port " << port << " is still listened on";
    return;
  }
  FAIL() << "no stretch of four free ports";
}

TEST(GlooBootstrapTest, RangesThatAreFullOrNone) {
  TestGroup group = CpuGroup(1);
  GlooOptions options = Loopback();
  const int taken = socket(AF_INET, SOCK_STREAM, 0);
  sockaddr_in at{};
  at.sin_family = AF_INET;
  at.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  socklen_t bytes = sizeof(at);
  ASSERT_EQ(bind(taken, reinterpret_cast<const sockaddr*>(&at), sizeof(at)), 0);
  ASSERT_EQ(listen(taken, 1), 0);
  ASSERT_EQ(getsockname(taken, reinterpret_cast<sockaddr*>(&at), &bytes), 0);
  options.port_begin = options.port_end = ntohs(at.sin_port);
  MemoryStore store;
  const absl::Status full = CreateGlooCommunicator(0, 1, store, *group.ranks[0].device, options).status();
  EXPECT_EQ(full.code(), absl::StatusCode::kResourceExhausted) << full;
  EXPECT_NE(full.message().find(absl::StrCat(options.port_begin)), std::string::npos) << full;
  close(taken);

  for (const auto& [begin, end] : {std::pair(9, 8), std::pair(-1, 5), std::pair(0, 5), std::pair(65000, 65536)}) {
    options.port_begin = begin;
    options.port_end = end;
    const absl::Status none = CreateGlooCommunicator(0, 1, store, *group.ranks[0].device, options).status();
    EXPECT_EQ(none.code(), absl::StatusCode::kInvalidArgument) << begin << " to " << end << ": " << none;
  }
}

TEST(GlooBootstrapTest, MissingRanksAreNamed) {
  MemoryStore store;
  TestGroup group = CpuGroup(2);
  const absl::Time start = absl::Now();
  for (const CommOrError& comm :
       CreateAll(4, {0, 2}, store, group, [](int) { return Loopback(absl::Milliseconds(300)); })) {
    const absl::Status& status = comm.status();
    EXPECT_EQ(status.code(), absl::StatusCode::kDeadlineExceeded) << status;
    EXPECT_NE(status.message().find("rank 1, rank 3"), std::string::npos) << status;
  }
  EXPECT_GE(absl::Now() - start, absl::Milliseconds(300));
  EXPECT_LT(absl::Now() - start, kSoon);
}

// Their addresses are known, so the others wait for their connections.
TEST(GlooBootstrapTest, RanksThatPublishAndDoNotConnectAreNamed) {
  MemoryStore store;
  TestGroup group = CpuGroup(2);
  ASSERT_TRUE(store.Set("comm/address/2", "127.0.0.1 1 7 no-gloo").ok());
  for (const CommOrError& comm :
       CreateAll(3, {0, 1}, store, group, [](int) { return Loopback(absl::Milliseconds(300)); })) {
    EXPECT_EQ(comm.status().code(), absl::StatusCode::kDeadlineExceeded) << comm.status();
    EXPECT_NE(comm.status().message().find("connection from rank 2"), std::string::npos) << comm.status();
  }
}

TEST(GlooBootstrapTest, ARankThatIsNotThereAnyMoreIsNamedAtOnce) {
  MemoryStore store;
  TestGroup group = CpuGroup(1);
  const int probe = Connect(1);
  ASSERT_EQ(probe, -1) << "somebody listens on port 1";
  ASSERT_TRUE(store.Set("comm/address/0", "127.0.0.1 1 7 no-gloo").ok());
  const absl::Time start = absl::Now();
  const absl::Status status = CreateGlooCommunicator(1, 2, store, *group.ranks[0].device, Loopback()).status();
  EXPECT_EQ(status.code(), absl::StatusCode::kUnavailable) << status;
  EXPECT_NE(status.message().find("rank 0"), std::string::npos) << status;
  EXPECT_LT(absl::Now() - start, kSoon);
}

TEST(GlooBootstrapTest, AClosedStoreEndsTheWaitingForAddressesAndForConnections) {
  for (const bool addresses_known : {false, true}) {
    MemoryStore store;
    TestGroup group = CpuGroup(1);
    if (addresses_known) {
      ASSERT_TRUE(store.Set("comm/address/1", "127.0.0.1 1 7 no-gloo").ok());
    }
    std::thread closer([&] {
      absl::SleepFor(absl::Milliseconds(200));
      store.Close(absl::CancelledError("the group is given up"));
    });
    const absl::Time start = absl::Now();
    const absl::Status status = CreateGlooCommunicator(0, 2, store, *group.ranks[0].device, Loopback()).status();
    closer.join();
    EXPECT_EQ(status.code(), absl::StatusCode::kCancelled) << status;
    EXPECT_NE(status.message().find("the group is given up"), std::string::npos) << status;
    EXPECT_LT(absl::Now() - start, absl::Seconds(10));
  }
}

TEST(GlooBootstrapTest, TwoRanksAlike) {
  MemoryStore store;
  TestGroup group = CpuGroup(2);
  int refused = 0;
  for (const CommOrError& comm :
       CreateAll(3, {1, 1}, store, group, [](int) { return Loopback(absl::Milliseconds(300)); })) {
    ASSERT_FALSE(comm.ok());
    if (!absl::IsAlreadyExists(comm.status())) continue;
    ++refused;
    EXPECT_NE(comm.status().message().find("rank 1"), std::string::npos) << comm.status();
  }
  EXPECT_EQ(refused, 1);
}

TEST(GlooBootstrapTest, SettingsThatDifferAreRefused) {
  MemoryStore store;
  TestGroup group = CpuGroup(2);
  const std::vector<CommOrError> comms = CreateAll(2, {0, 1}, store, group, [](int rank) {
    GlooOptions options = Loopback(absl::Milliseconds(500));
    if (rank == 1) options.gloo_min_bytes = 4096;
    return options;
  });
  for (const CommOrError& comm : comms) {
    EXPECT_EQ(comm.status().code(), absl::StatusCode::kFailedPrecondition) << comm.status();
    EXPECT_NE(comm.status().message().find("gloo_min_bytes=4096"), std::string::npos) << comm.status();
  }
}

TEST(GlooBootstrapTest, DevicesOutOfTheHostsReachAreRefused) {
  MemoryStore store;
  TestGroup group = CpuGroup(1);
  const std::unique_ptr<Device> device = CreateOpaqueDevice(std::move(group.ranks[0].device));
  const absl::Status status = CreateGlooCommunicator(0, 1, store, *device, Loopback()).status();
  EXPECT_EQ(status.code(), absl::StatusCode::kUnimplemented) << status;
}

// Strangers that reach the port: silent ones, ones that send what is no greeting, and one that knows the format but not
// the token. More of them than the rank keeps.
TEST(GlooBootstrapTest, StrangersDisturbNobody) {
  MemoryStore store;
  TestGroup group = CpuGroup(3);
  std::vector<int> strangers;
  std::thread visitor([&] {
    const int port = PublishedPort(store, 0);
    const std::string junk(4096, 'x'), http = "GET / HTTP/1.1\r\n\r\n";
    std::string hello("SOL1");  // the magic, then kind 0, rank 1, size 3, another token
    const uint32_t words[] = {0, 1, 3, 12345, 67890};
    hello.append(reinterpret_cast<const char*>(words), sizeof(words));
    for (int i = 0; i < 100; ++i) {
      const int fd = Connect(port);
      if (fd < 0) continue;
      strangers.push_back(fd);
      const std::string& text = i % 4 == 0 ? junk : i % 4 == 1 ? http : i % 4 == 2 ? hello : hello.substr(0, 5);
      if (i % 5 != 0) (void)!send(fd, text.data(), text.size(), MSG_NOSIGNAL);
    }
  });
  std::vector<CommOrError> comms(3);
  std::vector<std::thread> threads;
  for (int r = 0; r < 3; ++r) {
    threads.emplace_back([&, r] {
      if (r > 0) absl::SleepFor(absl::Milliseconds(300));  // the strangers are first
      comms[r] = CreateGlooCommunicator(r, 3, store, *group.ranks[r].device, Loopback());
    });
  }
  for (std::thread& thread : threads) thread.join();
  visitor.join();
  EXPECT_GT(strangers.size(), 50u);
  ExpectWorks(group, std::move(comms));
  for (const int fd : strangers) close(fd);
}

}  // namespace
}  // namespace soloist
