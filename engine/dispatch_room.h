// DispatchRoom: how many rows each (home, expert) gets room for in a step's masked dispatch: fewer than the worst case,
// which is all of a home's tokens, so that fewer bytes travel; enough that a step is seldom run again.
#ifndef SOLOIST_ENGINE_DISPATCH_ROOM_H_
#define SOLOIST_ENGINE_DISPATCH_ROOM_H_

#include <cstdint>
#include <string_view>
#include <vector>

#include "absl/status/statusor.h"
#include "engine/engine.h"

namespace soloist {

struct DispatchRoomOptions {
  enum class Kind {
    kAuto,   // by what a uniform choice of experts would want, then by what was wanted
    kWorst,  // room for all: no step is ever run again
    kFixed,  // `rows`
  };
  Kind kind = Kind::kAuto;
  int32_t rows = 0;                // kFixed: >= 1
  int64_t masked_max_tokens = 64;  // steps with more tokens on a home are not masked: see DispatcherOptions
};

// auto, worst or a number of rows, for DispatchRoomOptions' kind and rows; INVALID_ARGUMENT for anything else.
absl::StatusOr<DispatchRoomOptions> ParseDispatchRoom(std::string_view text);

// One thread.
class DispatchRoom {
 public:
  // Up to so many tokens on the busiest home, kAuto leaves room for all: there is little to save.
  static constexpr int32_t kFewTokens = 16;
  // Steps of about the same size after which kAuto may take some room back.
  static constexpr int kWindow = 256;

  DispatchRoom(const DispatchRoomOptions& options, const EngineInfo& info);

  // For a step with so many tokens on the busiest home; 0: room for all.
  int32_t Choose(int32_t max_home_tokens) const;
  // What such a step wanted: the most rows of any (home, expert) in a layer. `overflowed`: more than it had room for.
  void Observe(int32_t max_home_tokens, int64_t most_rows, bool overflowed);
  // Whether Observe would do anything: what it wants may be dear.
  bool Observes(int32_t max_home_tokens) const;

 private:
  // Steps whose number of tokens is between two multiples of kFewTokens.
  struct Class {
    int64_t rows = 0;  // a multiple of 8
    int64_t most = 0;  // of the window so far
    int steps = 0;     // of it
  };
  const Class& ClassOf(int32_t max_home_tokens) const { return classes_[(max_home_tokens - 1) / kFewTokens]; }

  const DispatchRoomOptions options_;
  const bool exchanges_;  // a rank alone has no masked steps
  std::vector<Class> classes_;
};

}  // namespace soloist

#endif  // SOLOIST_ENGINE_DISPATCH_ROOM_H_
