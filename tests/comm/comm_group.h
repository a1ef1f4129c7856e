// A group of ranks for the tests of engine/comm: each rank a thread with its device, stream and communicator.
//
// Host data goes to and from a rank by Device::Copy, and is read after Synchronize, so that the same tests hold for
// backends whose streams are asynchronous.
#ifndef SOLOIST_TESTS_COMM_COMM_GROUP_H_
#define SOLOIST_TESTS_COMM_COMM_GROUP_H_

#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <string_view>
#include <thread>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "base/check.h"
#include "engine/comm/communicator.h"
#include "kernels/device.h"
#include "tests/kernels/opaque_device.h"

namespace soloist {

// What one rank's thread has. Its destructor destroys the communicator first.
struct TestRank {
  std::unique_ptr<Device> device;
  std::unique_ptr<Stream> stream;
  std::unique_ptr<Communicator> comm;

  int id() const { return comm->rank(); }
  int size() const { return comm->size(); }
  // A device buffer of `bytes` bytes, all `fill`.
  Buffer Filled(int64_t bytes, uint8_t fill) {
    const std::vector<uint8_t> host(static_cast<size_t>(bytes), fill);
    return Upload(host);
  }
  template <typename T>
  Buffer Upload(const std::vector<T>& host) {
    const auto bytes = static_cast<int64_t>(host.size() * sizeof(T));
    absl::StatusOr<Buffer> buffer = device->Allocate(bytes);
    CHECK_OK(buffer.status());
    device->Copy(buffer->data(), host.data(), bytes, *stream);
    CHECK_OK(stream->Synchronize());
    return *std::move(buffer);
  }
  // The bytes at `data` once the stream is done. Only where the stream has no error.
  template <typename T = uint8_t>
  std::vector<T> Download(const void* data, int64_t count) {
    std::vector<T> host(static_cast<size_t>(count));
    device->Copy(host.data(), data, count * static_cast<int64_t>(sizeof(T)), *stream);
    CHECK_OK(stream->Synchronize());
    return host;
  }
  // The outcome of an enqueued call: what the call itself or the stream says.
  absl::Status Finish(const absl::Status& enqueued) { return enqueued.ok() ? stream->Synchronize() : enqueued; }
};

struct TestGroup {
  std::unique_ptr<DeviceFactory> factory;  // outlives the ranks
  std::vector<TestRank> ranks;

  int size() const { return static_cast<int>(ranks.size()); }
  // Calls `body` on all ranks at once, each in its own thread, and waits for all.
  void Run(const std::function<void(TestRank&)>& body) {
    std::vector<std::thread> threads;
    threads.reserve(ranks.size());
    for (TestRank& rank : ranks) threads.emplace_back([&body, &rank] { body(rank); });
    for (std::thread& thread : threads) thread.join();
  }
};

// `size` ranks that have no communicator yet.
inline TestGroup CpuGroup(int size) {
  TestGroup group;
  group.factory = CreateDeviceFactory({.kind = "cpu", .cpu_threads = 1}).value();
  for (int r = 0; r < size; ++r) {
    TestRank rank;
    rank.device = group.factory->CreateDevice(r).value();
    rank.stream = rank.device->CreateStream().value();
    group.ranks.push_back(std::move(rank));
  }
  return group;
}

inline TestGroup SharedMemoryTestGroup(int size, const CommOptions& options = {}) {
  TestGroup group = CpuGroup(size);
  auto comms = CreateSharedMemoryCommunicators(size, *group.ranks[0].device, options).value();
  for (int r = 0; r < size; ++r) group.ranks[r].comm = std::move(comms[r]);
  return group;
}

// Its device's memory is out of the host's reach.
inline TestGroup SelfTestGroup(int /*size*/ = 1, const CommOptions& /*options*/ = {}) {
  TestGroup group = CpuGroup(1);
  TestRank& rank = group.ranks[0];
  rank.device = CreateOpaqueDevice(std::move(rank.device));
  rank.comm = CreateSelfCommunicator(*rank.device);
  return group;
}

}  // namespace soloist

#endif  // SOLOIST_TESTS_COMM_COMM_GROUP_H_
