// How much room a step gets, and how that follows what steps have wanted.
#include "engine/dispatch_room.h"

#include <string>

#include "gtest/gtest.h"

namespace soloist {
namespace {

EngineInfo Info(int ranks) {
  EngineInfo info;
  info.num_ranks = ranks;
  info.num_experts = 16;
  info.experts_per_token = 2;
  info.limits.max_tokens = 128;
  return info;
}

TEST(DispatchRoomTest, Parse) {
  EXPECT_EQ(ParseDispatchRoom("auto")->kind, DispatchRoomOptions::Kind::kAuto);
  EXPECT_EQ(ParseDispatchRoom("worst")->kind, DispatchRoomOptions::Kind::kWorst);
  const auto fixed = ParseDispatchRoom("12");
  ASSERT_EQ(fixed.status(), absl::OkStatus());
  EXPECT_EQ(fixed->kind, DispatchRoomOptions::Kind::kFixed);
  EXPECT_EQ(fixed->rows, 12);
  for (const char* text : {"", "0", "-3", "8x", "best", "99999999999", "1.5"}) {
    const auto refused = ParseDispatchRoom(text);
    EXPECT_EQ(refused.status().code(), absl::StatusCode::kInvalidArgument) << text;
    EXPECT_NE(refused.status().message().find("'" + std::string(text) + "'"), std::string::npos);
  }
}

TEST(DispatchRoomTest, AutoIsTheWorstCaseForFewAndFourSigmaForMore) {
  const DispatchRoom room({.masked_max_tokens = 128}, Info(16));
  for (const int tokens : {0, 1, 8, 16}) EXPECT_EQ(room.Choose(tokens), 0) << tokens;
  // 32 tokens, p = 1/8: 4 + 4 * 1.87 = 11.5; 64: 8 + 4 * 2.65 = 18.6; 128: 16 + 4 * 3.74 = 31.
  EXPECT_EQ(room.Choose(17), 16);
  EXPECT_EQ(room.Choose(32), 16);
  EXPECT_EQ(room.Choose(64), 24);
  EXPECT_EQ(room.Choose(128), 32);
  EXPECT_EQ(room.Choose(129), 0) << "not masked";
}

TEST(DispatchRoomTest, WorstFixedAndOneRank) {
  const DispatchRoom worst({.kind = DispatchRoomOptions::Kind::kWorst, .masked_max_tokens = 128}, Info(16));
  EXPECT_EQ(worst.Choose(100), 0);
  const DispatchRoom fixed({.kind = DispatchRoomOptions::Kind::kFixed, .rows = 5, .masked_max_tokens = 128}, Info(16));
  EXPECT_EQ(fixed.Choose(5), 0) << "room for all";
  EXPECT_EQ(fixed.Choose(6), 5);
  EXPECT_EQ(fixed.Choose(128), 5);
  EXPECT_EQ(fixed.Choose(129), 0);
  EXPECT_EQ(DispatchRoom({.masked_max_tokens = 128}, Info(1)).Choose(64), 0);
}

TEST(DispatchRoomTest, GrowsAtOnceAndShrinksSlowly) {
  DispatchRoom room({.masked_max_tokens = 128}, Info(16));
  ASSERT_EQ(room.Choose(60), 24);
  room.Observe(60, 30, /*overflowed=*/true);
  EXPECT_EQ(room.Choose(60), 40);  // 30 and a quarter, to a multiple of 8
  EXPECT_EQ(room.Choose(44), 16) << "steps of another size are another matter";
  EXPECT_EQ(room.Choose(64), 40);
  room.Observe(60, 59, true);
  EXPECT_EQ(room.Choose(60), 0) << "more than all";
  // 8 rows after each window in which 25 were the most: 25 and a quarter is 32.
  int windows = 0;
  for (; windows < 20 && (room.Choose(60) == 0 || room.Choose(60) > 32); ++windows) {
    for (int i = 0; i < DispatchRoom::kWindow; ++i) room.Observe(60, i == 100 ? 25 : 3, false);
  }
  EXPECT_EQ(windows, 6);  // from 80
  for (int i = 0; i < 5 * DispatchRoom::kWindow; ++i) room.Observe(60, i % 100 == 0 ? 25 : 3, false);
  EXPECT_EQ(room.Choose(60), 32) << "not below what is wanted";
  for (int i = 0; i < 50 * DispatchRoom::kWindow; ++i) room.Observe(60, 1, false);
  EXPECT_EQ(room.Choose(60), 8);
  EXPECT_FALSE(room.Observes(16));
  EXPECT_TRUE(room.Observes(17));
  EXPECT_FALSE(room.Observes(129));
}

}  // namespace
}  // namespace soloist
