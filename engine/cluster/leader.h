// Leader: the ClusterEngine. Private to engine/cluster.
//
// One mutex guards all of it. gRPC may run reactions inside its own calls, so none is made with the mutex held:
// messages are queued under it (so their order is the order of decisions), and written, streams are cut and callbacks
// made when it is let go (Lock). The steps' own messages go another way: Submit sends them after it has let go.
//
// Three threads beside the callers': the coordinator, which makes the group whole whenever it is not (leader_group.cc),
// the watch, which finds who is silent or late (the same file), and gRPC's, which bring messages (leader_members.cc).
#ifndef SOLOIST_ENGINE_CLUSTER_LEADER_H_
#define SOLOIST_ENGINE_CLUSTER_LEADER_H_

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "engine/cluster/bootstrap_streams.h"
#include "engine/cluster/cluster_engine.h"
#include "engine/cluster/wire.h"
#include "engine/cluster/worker_link.h"
#include "engine/placement/parallel_plan.h"
#include "engine/worker/plan_intake.h"
#include "proto/worker.pb.h"

namespace soloist {

class Leader final : public ClusterEngine, private LinkEvents {
 public:
  // `options.engine` is complete and checked. `config_hash` and `checkpoint_hash` are the leader's own (the second may
  // be empty: the first worker's). `expert_bytes`: weights of an expert, all layers.
  struct Expectations {
    std::string build_id;
    std::string config_hash;
    std::string checkpoint_hash;
    int64_t expert_bytes = 0;
  };
  Leader(ClusterOptions options, EngineInfo info, Expectations expectations, const Clock& clock);
  ~Leader() override;

  absl::Status Listen();
  // Until all ranks are ready, or start_timeout.
  absl::Status AwaitReady(const ClusterProgress& on_progress);

  const std::string& address() const override { return address_; }
  ClusterCosts Costs() const override;
  const EngineInfo& Info() const override { return *published_.load(); }
  absl::Status Submit(StepPlan plan) override;
  absl::StatusOr<StepResult> Await() override;
  absl::StatusOr<Recovery> Recover(absl::Duration timeout) override;
  std::vector<RankStatus> Ranks() const override;

 private:
  using LinkPtr = std::shared_ptr<WorkerLink>;

  // A worker that has said a good hello.
  struct Member {
    LinkPtr link;
    int64_t id = 0;  // never used again
    worker::v1::Hello hello;
    int rank = -1;  // -1: a spare
    bool spare_ready = false;
    int64_t loaded_bytes = 0, total_bytes = 0;
    worker::v1::Loaded loaded;
    bool is_loaded = false;
    bool asked_to_allocate = false;
    bool is_allocated = false;
    int64_t asked_place = 0, place = 0;  // number of the Place; 0: as assigned; -1: none, it could not take the last
    int64_t free_bytes = 0;              // when it left its last group
    int64_t joining_epoch = 0;           // told to join; 0: none yet
    int64_t joined_epoch = 0;            // its communicator stands
    int64_t ready_epoch = 0;
    int64_t aborted_epoch = 0;
    std::string transport;
    std::string order_hash;
    int64_t last_heard_ns = 0;
    int64_t last_step = 0, last_step_ns = 0;
  };
  using MemberPtr = std::shared_ptr<Member>;

  struct Slot {
    MemberPtr member;       // null: open
    int64_t lost_ns = 0;    // when the one was lost that was in a group; 0: none was, or its place is taken
    std::string why;        // ... or the latest in its place, and why
    bool given_up = false;  // the group has been formed without it: the others have its experts
  };

  // A step on its way.
  struct PendingStep {
    StepResult result;
    std::vector<int32_t> rows;  // logit rows of each rank
    std::vector<bool> done;
    int ranks_left = 0;
    int64_t submitted_ns = 0;
    int64_t first_done_ns = 0;  // of the first rank; 0: none yet
  };

  // Holds mutex_; what After was given meanwhile runs when it is let go.
  class Lock {
   public:
    explicit Lock(Leader& leader) : leader_(leader), lock_(leader.mutex_) {}
    ~Lock() { Release(); }
    // Waits for changed_ until `done` or the deadline (Clock of the system, ns; < 0: none). False at the deadline.
    bool WaitUntil(std::chrono::steady_clock::time_point deadline, const std::function<bool()>& done);
    void Wait(const std::function<bool()>& done);

   private:
    void Release();
    Leader& leader_;
    std::unique_lock<std::mutex> lock_;
  };
  void After(std::function<void()> action) { after_.push_back(std::move(action)); }
  // Queues the message; it is written when the lock is let go.
  void Tell(const LinkPtr& link, const worker::v1::LeaderMessage& message);

  // leader_members.cc. All but the two events with mutex_ held.
  void OnMessage(const LinkPtr& link, grpc::ByteBuffer& message) override;
  void OnGone(const LinkPtr& link) override;
  MemberPtr Find(const LinkPtr& link) const;  // null: none, or no longer
  void OnResult(const LinkPtr& link, const WorkerFrame& frame);
  void OnHello(const LinkPtr& link, const worker::v1::Hello& hello);
  void OnMemberMessage(const MemberPtr& member, const worker::v1::WorkerMessage& message);
  void OnLoaded(const MemberPtr& member, const worker::v1::Loaded& loaded);
  void OnGroupFailed(const Member& member, const worker::v1::GroupFailed& failed);
  absl::Status CheckHello(const worker::v1::Hello& hello) const;
  absl::Status CheckLoaded(const Member& member);
  absl::Status CheckMemory(const Member& member) const;
  int64_t FreeBytes(const Member& member) const;
  void Assign(const MemberPtr& member, int rank);
  void FillSlots();
  // Ends a worker with a reason; its place is open again.
  void Refuse(const LinkPtr& link, const absl::Status& reason);
  // Out of all tables. Returns it: what the caller had may have been the table's own pointer.
  MemberPtr Drop(const MemberPtr& member, const std::string& why);
  // Gives up a worker that is gone, silent, late or broken.
  void Lose(const MemberPtr& lost, const std::string& why);
  static std::string Describe(const worker::v1::Hello& hello);

  // leader_place.cc. With mutex_ held.
  absl::Status AwaitMembers(Lock& lock);
  bool ChooseGroup();
  bool MayGoWithout(const Slot& slot) const;
  absl::Status CheckRoom(const std::vector<int>& group, const ExpertPlacement& placement) const;
  absl::Status PlaceAll(Lock& lock);
  void OnPlaced(Member& member, const worker::v1::Placed& placed);
  void AskToAllocate(Member& member);
  int RankToReturn() const;  // that is ready to be one of the group again; -1: none
  void Publish();
  std::string ExpertsOf(int rank) const;  // who has them

  // leader_group.cc. With mutex_ held.
  void Coordinate();
  absl::Status Assemble(Lock& lock);
  void LeaveOldGroup(Lock& lock);
  absl::Status AllocateAll(Lock& lock);
  absl::Status FormGroup(Lock& lock);
  absl::Status CheckGroup() const;
  void BreakGroup(const std::string& why);
  void Fatal(const absl::Status& status);
  bool All(const std::function<bool(const Member&)>& is) const;
  void Watch();
  void CheckSilence(int64_t now_ns);
  void CheckSteps(int64_t now_ns);
  std::string Missing() const;
  std::string StateOf(const Slot& slot) const;

  const ClusterOptions options_;
  EngineInfo info_;               // complete once AwaitReady has returned
  std::deque<EngineInfo> infos_;  // all that ever were published
  std::atomic<const EngineInfo*> published_;
  Expectations expectations_;
  const Clock& clock_;
  worker::v1::WorkerConfig config_;
  std::string address_;

  mutable std::mutex mutex_;
  std::condition_variable changed_;  // members, group, stopping
  std::condition_variable done_;     // a step has all its results, or there is an error
  std::vector<std::function<void()>> after_;

  std::map<const WorkerLink*, MemberPtr> members_;
  std::vector<Slot> slots_;           // [num_ranks]
  std::deque<std::string> refusals_;  // the latest, for those who wait
  int64_t next_id_ = 1;

  // Of the group, or of the one that is being formed.
  std::vector<int> group_;              // its ranks, ascending
  const ExpertPlacement all_there_;     // when that is all
  ExpertPlacement placement_;           // in force
  int64_t place_ = 0, last_place_ = 0;  // number of the Place that says both; 0: what every worker is assigned
  std::string cannot_shrink_;           // why, until somebody comes or goes

  int64_t epoch_ = 0;
  bool group_alive_ = false;  // the epoch's; dead from the first failure on
  bool whole_ = false;        // alive, and every rank of it is ready
  int failed_starts_ = 0;     // groups that could not be formed, before the first that could
  absl::Status join_error_;   // why the latest could not be formed
  BootstrapTable<LinkPtr> bootstrap_;

  bool serving_ = false;         // AwaitReady has succeeded
  bool needs_recovery_ = false;  // the group has broken since the last Recover
  absl::Status broken_;          // why, UNAVAILABLE
  int64_t broken_ns_ = 0;
  absl::Status final_error_;
  std::vector<int64_t> served_ids_;  // [num_ranks] whose KV the scheduler believes in; 0: nobody's
  std::shared_ptr<const std::vector<LinkPtr>> serving_links_;  // [num_ranks]; null: not in the group

  PlanIntake intake_{info_};
  std::deque<std::unique_ptr<PendingStep>> pending_;
  int64_t first_pending_ = 1;  // number of pending_.front()

  std::atomic<int64_t> steps_{0}, submit_ns_{0}, result_ns_{0};

  bool stopping_ = false;
  std::unique_ptr<ClusterServer> server_;
  std::thread coordinator_;
  std::thread watch_;
};

}  // namespace soloist

#endif  // SOLOIST_ENGINE_CLUSTER_LEADER_H_
