#include "engine/cluster/host_facts.h"

#include <unistd.h>

#include <algorithm>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <system_error>

namespace soloist {
namespace {

std::string ReadWord(const std::filesystem::path& path) {
  std::ifstream file(path);
  std::string word;
  file >> word;
  return word;
}

// Names in a folder of /sys, sorted; none if there is no such folder.
std::vector<std::string> Names(const std::filesystem::path& folder) {
  std::vector<std::string> names;
  std::error_code error;
  for (const auto& entry : std::filesystem::directory_iterator(folder, error)) {
    names.push_back(entry.path().filename().string());
  }
  std::ranges::sort(names);
  return names;
}

}  // namespace

HostFacts DescribeHost(int gpu) {
  HostFacts facts;
  char name[256] = {};
  if (gethostname(name, sizeof(name) - 1) == 0) facts.name = name;
  const std::filesystem::path net = "/sys/class/net", pci = "/sys/bus/pci/devices";
  for (const std::string& interface : Names(net)) {
    if (interface != "lo" && ReadWord(net / interface / "operstate") == "up") {
      facts.network_interfaces.push_back(interface);
    }
  }
  for (const std::string& device : Names("/sys/class/infiniband")) facts.network_interfaces.push_back("ib:" + device);
  int found = 0;
  for (const std::string& device : Names(pci)) {
    // Vendor NVIDIA, class display controller.
    if (gpu < 0 || ReadWord(pci / device / "vendor") != "0x10de") continue;
    if (!ReadWord(pci / device / "class").starts_with("0x03") || found++ != gpu) continue;
    facts.pci_address = device;
    const std::string node = ReadWord(pci / device / "numa_node");
    if (!node.empty()) facts.numa_node = static_cast<int>(std::strtol(node.c_str(), nullptr, 10));
  }
  return facts;
}

}  // namespace soloist
