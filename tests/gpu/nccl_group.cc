#include "tests/gpu/nccl_group.h"

#include <fcntl.h>
#include <unistd.h>

#include <cerrno>
#include <cstdio>
#include <fstream>
#include <iterator>
#include <optional>

#include "absl/strings/str_cat.h"
#include "base/status.h"

namespace soloist {
namespace {

std::optional<std::string> ReadFile(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  if (!file) return std::nullopt;
  return std::string(std::istreambuf_iterator<char>(file), {});
}

}  // namespace

NcclTestFlags& NcclFlags() {
  static NcclTestFlags flags;
  return flags;
}

std::string FileStore::PathOf(const std::string& key) const {
  std::string name = key;
  std::replace(name.begin(), name.end(), '/', '_');
  return prefix_ + name;
}

// A link appears at once and whole, and fails if the name is taken.
absl::Status FileStore::Set(const std::string& key, const std::string& value) {
  const std::string path = PathOf(key), whole = absl::StrCat(path, ".tmp", getpid());
  std::ofstream(whole, std::ios::binary) << value;
  const int error = link(whole.c_str(), path.c_str()) == 0 ? 0 : errno;
  unlink(whole.c_str());
  if (error == 0 || (error == EEXIST && ReadFile(path) == value)) return absl::OkStatus();
  if (error == EEXIST) return AlreadyExists("{} is set to another value than {}", key, value);
  return Internal("{}: cannot write {} (errno {})", key, path, error);
}

absl::StatusOr<std::string> FileStore::Get(const std::string& key, absl::Duration timeout) {
  const absl::Time deadline = absl::Now() + timeout;
  while (true) {
    if (auto value = ReadFile(PathOf(key))) return *value;
    if (absl::Now() >= deadline) return DeadlineExceeded("{} is not set", key);
    absl::SleepFor(absl::Milliseconds(2));
  }
}

absl::Status FileStore::Meet(const std::string& point, int ranks, absl::Duration timeout) {
  RETURN_IF_ERROR(Set(absl::StrCat(point, "/", NcclFlags().rank), "here"));
  for (int rank = 0; rank < ranks; ++rank) {
    const auto here = Get(absl::StrCat(point, "/", rank), timeout);
    if (!here.ok()) return here.status();
  }
  return absl::OkStatus();
}

TestRank MakeBareRank() {
  static DeviceFactory& factory = *CreateDeviceFactory({.kind = NcclFlags().location}).value().release();
  TestRank rank;
  rank.device = factory.CreateDevice(0).value();
  CHECK_OK(rank.device->BindThread());
  rank.stream = rank.device->CreateStream().value();
  return rank;
}

TestRank MakeNcclRank(FileStore& store, absl::Duration timeout) {
  TestRank rank = MakeBareRank();
  auto comm =
      CreateNcclCommunicator(NcclFlags().rank, NcclFlags().size, store, *rank.device, {.comm = {.timeout = timeout}});
  CHECK_OK(comm.status());
  rank.comm = *std::move(comm);
  return rank;
}

}  // namespace soloist
