// Which transport a rank uses, from lines as NCCL 2.28 writes them.
#include "engine/comm/nccl_log.h"

#include <cstdio>
#include <cstdlib>
#include <string>
#include <utility>

#include "gtest/gtest.h"

namespace soloist {
namespace {

constexpr char kNvlinkRing[] =
    "h:9:17 [0] NCCL INFO Pattern 4, crossNic 0, nChannels 12, bw 20.000000/20.000000, type NVL/PIX, sameChannels 1\n";
constexpr char kPcieRing[] =
    "h:9:17 [0] NCCL INFO Pattern 4, crossNic 0, nChannels 2, bw 12.000000/12.000000, type PHB/PIX, sameChannels 1\n";
constexpr char kPcieTree[] =
    "h:9:17 [0] NCCL INFO Pattern 1, crossNic 0, nChannels 2, bw 12.000000/12.000000, type PHB/PIX, sameChannels 1\n";
constexpr char kP2p[] = "h:9:17 [0] NCCL INFO Channel 00/0 : 0[0] -> 1[1] via P2P/CUMEM/read\n";
constexpr char kShm[] = "h:9:17 [0] NCCL INFO Channel 01 : 0[0] -> 2[2] via SHM/direct/direct\n";
constexpr char kIb[] = "h:9:17 [0] NCCL INFO Channel 00/1 : 8[0] -> 0[0] [receive] via NET/IB/0/GDRDMA\n";
constexpr char kIbByPeer[] = "h:9:17 [0] NCCL INFO Channel 00/0 : 0[0] -> 8[0] [send] via NET/IB/3(2)/GDRDMA/Shared\n";
constexpr char kSocket[] = "h:9:17 [0] NCCL INFO Channel 00/1 : 0[0] -> 8[0] [send] via NET/Socket/0\n";
constexpr char kPlugin[] = "h:9:17 [0] NCCL INFO Channel 00/1 : 0[0] -> 8[0] [send] via NET/AWS Libfabric/0/GDRDMA\n";

std::string SlowestOf(const std::string& log) { return ParseNcclLog(log).slowest; }

TEST(NcclLogTest, OneKind) {
  EXPECT_EQ(SlowestOf(std::string(kNvlinkRing) + kP2p), "nvlink");
  EXPECT_EQ(SlowestOf(std::string(kPcieRing) + kP2p), "p2p");
  EXPECT_EQ(SlowestOf(kShm), "shm");
  EXPECT_EQ(SlowestOf(kIb), "ib");
  EXPECT_EQ(SlowestOf(kIbByPeer), "ib");
  EXPECT_EQ(SlowestOf(kSocket), "socket");
  EXPECT_EQ(SlowestOf(kPlugin), "net/AWS Libfabric");
}

TEST(NcclLogTest, TheRingTellsNvlinkAndPcieApart) {
  EXPECT_EQ(SlowestOf(kP2p), "p2p") << "nothing says that it is NVLink";
  EXPECT_EQ(SlowestOf(std::string(kNvlinkRing) + kPcieRing + kP2p), "p2p") << "the slower of two";
  EXPECT_EQ(SlowestOf(std::string(kNvlinkRing) + kPcieTree + kP2p), "nvlink") << "a tree is no ring";
  EXPECT_EQ(SlowestOf(std::string(kP2p) + kNvlinkRing), "nvlink");
}

// Each with all that are faster.
TEST(NcclLogTest, TheSlowestCounts) {
  std::string log = std::string(kNvlinkRing) + kP2p;
  for (const auto& [line, kind] : {std::pair(kIb, "ib"), std::pair(kPlugin, "net/AWS Libfabric"),
                                   std::pair(kShm, "shm"), std::pair(kSocket, "socket")}) {
    log.insert(0, line);
    EXPECT_EQ(SlowestOf(log), kind);
    EXPECT_EQ(SlowestOf(log + kP2p), kind);
  }
}

TEST(NcclLogTest, OtherLinesAreNoConnections) {
  EXPECT_EQ(SlowestOf(""), "");
  EXPECT_EQ(SlowestOf("h:9:17 [0] NCCL INFO NET/Socket : Using [0]lo:127.0.0.1<0>\n"
                      "h:9:17 [0] NCCL INFO Using network Socket\n"
                      "h:9:17 [0] NCCL INFO reached via nothing/at/all\n"),
            "");
}

TEST(NcclLogTest, SummaryCountsConnections) {
  EXPECT_EQ(ParseNcclLog(std::string(kSocket) + kP2p + kSocket + kShm).summary,
            "NET/Socket x 2, P2P/CUMEM x 1, SHM/direct x 1");
}

// NCCL opens the file by its name and writes; what was written is read back.
TEST(NcclLogTest, KeepsWhatIsWrittenToTheFile) {
  ASSERT_EQ(unsetenv("NCCL_DEBUG"), 0);
  ASSERT_EQ(unsetenv("NCCL_DEBUG_FILE"), 0);
  ASSERT_EQ(setenv("NCCL_DEBUG_SUBSYS", "INIT", 1), 0);
  const NcclLog& log = NcclLog::OfProcess();
  ASSERT_TRUE(log.captured());
  EXPECT_STREQ(std::getenv("NCCL_DEBUG"), "INFO");
  EXPECT_STREQ(std::getenv("NCCL_DEBUG_SUBSYS"), "INIT") << "the user's stays";
  const char* name = std::getenv("NCCL_DEBUG_FILE");
  ASSERT_NE(name, nullptr);
  std::FILE* file = std::fopen(name, "w");
  ASSERT_NE(file, nullptr);
  std::fputs(kSocket, file);
  std::fflush(file);
  const int64_t first = log.size();
  EXPECT_EQ(first, static_cast<int64_t>(sizeof(kSocket) - 1));
  std::fputs(kShm, file);
  std::fclose(file);
  EXPECT_EQ(log.Since(first), kShm);
  EXPECT_EQ(log.Since(0), std::string(kSocket) + kShm);
  EXPECT_EQ(log.Since(log.size()), "");
  EXPECT_EQ(&NcclLog::OfProcess(), &log);
}

}  // namespace
}  // namespace soloist
