// GroupControl: the error of a group of ranks in different processes, and who has gone. Private to engine/comm.
//
// Each pair of ranks has a control connection. Abort sends the reason on all of them, a rank that leaves in good order
// says goodbye, and one that dies is seen by the end of its connections. Nothing runs in the background: news are read
// when a rank enters a call, waits in one (wake_fd) or asks for error().
//
// Which error is the group's first: whoever fails reads its news first, and takes what is there. Ranks that fail at the
// same moment, before hearing of each other, all wait a little (kSettle in the .cc) and take the lowest rank's reason.
// So all ranks return the same status, unless one of them is stopped for longer than that between the two.
#ifndef SOLOIST_ENGINE_COMM_GROUP_CONTROL_H_
#define SOLOIST_ENGINE_COMM_GROUP_CONTROL_H_

#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "engine/comm/tcp_socket.h"

namespace soloist {

// Thread-safe.
class GroupControl {
 public:
  // `control` [size]: the connections; the own one is not valid. Errors: no file descriptor left.
  static absl::StatusOr<std::unique_ptr<GroupControl>> Create(int rank, std::vector<Socket> control);
  // Says goodbye, unless the group has failed.
  ~GroupControl();
  GroupControl(const GroupControl&) = delete;
  GroupControl& operator=(const GroupControl&) = delete;

  // Readable when error() has something to read or the group has failed.
  int wake_fd() const { return epoll_.fd(); }
  // Reads the news. The group's error, or OK. Waits a little where it has just failed.
  absl::Status error();
  // Makes `reason` the group's error, if it has none. On return every peer that can be reached has it.
  void Abort(const absl::Status& reason);
  // The connection to `peer` is broken; `what` says how it was seen. Returns the group's error, which it makes sure
  // there is: the peer's own reason if it gave one, else UNAVAILABLE with its rank.
  absl::Status PeerBroken(int peer, std::string_view what);
  // As PeerBroken, where it is not known which peer it is.
  absl::Status SomeoneBroken(std::string_view what);

  // Called once, when the group fails, by the thread that finds it; must not block. Before any other call.
  void set_on_failure(std::function<void()> on_failure) { on_failure_ = std::move(on_failure); }

 private:
  struct Peer {
    Socket socket;
    std::string unread;    // the beginning of a frame
    bool goodbye = false;  // it has left in good order
    bool closed = false;
    std::string lost;  // how it was closed, if without a goodbye
  };

  GroupControl(int rank, std::vector<Socket> control, Socket epoll, Socket wake);

  bool failed() const { return !error_.ok(); }
  // Reads what has come; waits for something until `deadline`.
  void ReadNews(const Deadline& deadline);
  void ReadPeer(int peer);
  void HandleFrames(int peer);
  void Tell(const std::string& frame) const;
  void Propose(const absl::Status& reason);
  void Settle();
  absl::Status GoneOrLeft(int peer, std::string_view what) const;

  const int rank_;
  Socket epoll_;  // watches the connections and wake_
  Socket wake_;   // an eventfd, readable for ever once the group has failed
  std::function<void()> on_failure_;

  mutable std::mutex mutex_;
  std::vector<Peer> peers_;
  absl::Status proposal_;  // the best so far, while the group settles
  int proposed_by_ = -1;
  absl::Status error_;
};

}  // namespace soloist

#endif  // SOLOIST_ENGINE_COMM_GROUP_CONTROL_H_
