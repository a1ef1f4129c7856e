#include "engine/cluster/group_check.h"

#include <memory>
#include <numeric>
#include <vector>

#include "base/status.h"

namespace soloist {
namespace {

constexpr int64_t kBytesPerPair = 4096;

uint8_t Code(int64_t round, int from, int to, int64_t i) {
  uint64_t x =
      (static_cast<uint64_t>(round) * 131 + static_cast<uint64_t>(from)) * 65537 + static_cast<uint64_t>(to) + 1;
  x = x * 0x9e3779b97f4a7c15u + static_cast<uint64_t>(i) * 0xc2b2ae3d27d4eb4fu;
  x ^= x >> 31;
  return static_cast<uint8_t>(x * 0xbf58476d1ce4e5b9u >> 56);
}

int64_t UnevenBytes(int from, int to) { return 16 * (1 + (from * 7 + to * 3) % 61); }

struct Exchange {
  std::vector<int64_t> send_bytes, send_offsets, recv_bytes, recv_offsets;
  int64_t sent = 0, received = 0;
};

Exchange Plan(int rank, int size, bool even) {
  Exchange e;
  for (int peer = 0; peer < size; ++peer) {
    e.send_offsets.push_back(e.sent);
    e.recv_offsets.push_back(e.received);
    e.send_bytes.push_back(even ? kBytesPerPair : UnevenBytes(rank, peer));
    e.recv_bytes.push_back(even ? kBytesPerPair : UnevenBytes(peer, rank));
    e.sent += e.send_bytes.back();
    e.received += e.recv_bytes.back();
  }
  return e;
}

absl::Status CheckOne(Communicator& comm, Device& device, Stream& stream, int64_t round, bool even) {
  const int rank = comm.rank(), size = comm.size();
  const Exchange e = Plan(rank, size, even);
  std::vector<uint8_t> out(e.sent), in(e.received);
  for (int to = 0; to < size; ++to) {
    for (int64_t i = 0; i < e.send_bytes[to]; ++i) out[e.send_offsets[to] + i] = Code(round, rank, to, i);
  }
  ASSIGN_OR_RETURN(const Buffer send, device.Allocate(e.sent));
  ASSIGN_OR_RETURN(const Buffer recv, device.Allocate(e.received));
  device.Copy(send.data(), out.data(), e.sent, stream);
  RETURN_IF_ERROR(even ? comm.AllToAll(send.data(), recv.data(), kBytesPerPair, stream)
                       : comm.AllToAllV(send.data(), e.send_bytes, e.send_offsets, recv.data(), e.recv_bytes,
                                        e.recv_offsets, stream));
  RETURN_IF_ERROR(stream.Synchronize());
  device.Copy(in.data(), recv.data(), e.received, stream);
  RETURN_IF_ERROR(stream.Synchronize());
  for (int from = 0; from < size; ++from) {
    for (int64_t i = 0; i < e.recv_bytes[from]; ++i) {
      const uint8_t expected = Code(round, from, rank, i), found = in[e.recv_offsets[from] + i];
      if (found != expected) {
        return DataLoss("an all-to-all brought wrong bytes from rank {}: byte {} of {} is {:#04x}, expected {:#04x}",
                        from, i, e.recv_bytes[from], found, expected);
      }
    }
  }
  return comm.error();
}

}  // namespace

absl::Status CheckCollectives(Communicator& comm, Device& device, int64_t round) {
  ASSIGN_OR_RETURN(const std::unique_ptr<Stream> stream, device.CreateStream());
  RETURN_IF_ERROR(CheckOne(comm, device, *stream, round, /*even=*/true));
  RETURN_IF_ERROR(CheckOne(comm, device, *stream, round + 1, /*even=*/false));
  RETURN_IF_ERROR(comm.Barrier(*stream));
  return stream->Synchronize();
}

}  // namespace soloist
