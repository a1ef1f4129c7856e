// Flags of cuda_parity_test; see parity_main.cc.
#ifndef SOLOIST_TESTS_GPU_PARITY_FLAGS_H_
#define SOLOIST_TESTS_GPU_PARITY_FLAGS_H_

#include <string>

namespace soloist {

struct ParityFlags {
  std::string model_dir = "models/tiny";                 // --model=DIR
  std::string data = "tests/gpu/data/heldout.jsonl";     // --heldout=FILE, see make_heldout.cc
  std::string small_model_dir = "models/paper16-small";  // --small_model=DIR
  std::string device = "cuda";                           // --device=cpu: to test the test
};
ParityFlags& Flags();

}  // namespace soloist

#endif  // SOLOIST_TESTS_GPU_PARITY_FLAGS_H_
