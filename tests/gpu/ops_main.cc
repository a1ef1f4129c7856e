// main of cuda_ops_test: gtest's flags and --tuning-file=FILE (see DeviceOptions), so that runs under a sanitizer need
// not search for matrix algorithms.
#include <cstdio>
#include <string_view>

#include "gtest/gtest.h"
#include "tests/gpu/gpu_fixture.h"

int main(int argc, char** argv) {
  testing::InitGoogleTest(&argc, argv);
  constexpr std::string_view kTuningFile = "--tuning-file=";
  for (int i = 1; i < argc; ++i) {
    const std::string_view arg = argv[i];
    if (!arg.starts_with(kTuningFile)) {
      std::fprintf(stderr, "unknown flag %s\n", argv[i]);
      return 2;
    }
    soloist::Gpu::tuning_file() = arg.substr(kTuningFile.size());
  }
  return RUN_ALL_TESTS();
}
