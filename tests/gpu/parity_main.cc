// main of cuda_parity_test: gtest's flags and those of parity_flags.h. Run from the repository's root, or say where the
// models are.
#include <cstdio>
#include <string_view>

#include "gtest/gtest.h"
#include "tests/gpu/parity_flags.h"

namespace soloist {

ParityFlags& Flags() {
  static ParityFlags flags;
  return flags;
}

}  // namespace soloist

int main(int argc, char** argv) {
  testing::InitGoogleTest(&argc, argv);
  auto& flags = soloist::Flags();
  for (int i = 1; i < argc; ++i) {
    const std::string_view arg = argv[i];
    bool known = false;
    for (const auto& [name, value] :
         {std::pair("--model=", &flags.model_dir), std::pair("--heldout=", &flags.data),
          std::pair("--small_model=", &flags.small_model_dir), std::pair("--device=", &flags.device)}) {
      if (!arg.starts_with(name)) continue;
      *value = arg.substr(std::string_view(name).size());
      known = true;
    }
    if (!known) {
      std::fprintf(stderr, "unknown flag %s\n", argv[i]);
      return 2;
    }
  }
  return RUN_ALL_TESTS();
}
