// What the device reaches with plain loops: the limits that benchmarks divide by.
#ifndef SOLOIST_KERNELS_CUDA_RATES_H_
#define SOLOIST_KERNELS_CUDA_RATES_H_

#include <cuda_runtime_api.h>

#include <cstdint>

#include "absl/status/statusor.h"
#include "kernels/device.h"

namespace soloist::cuda {

// Reads `bytes` (a multiple of 16) at `data` once, 16 bytes a load, and writes one word per thread block to `sink`
// ([kReadBlocks]).
inline constexpr int kReadBlocks = 132 * 16;
cudaError_t LaunchRead(const void* data, int64_t bytes, uint32_t* sink, cudaStream_t stream);

// Read rate over 4 GiB that no cache holds, best of 12 passes; bf16 matrix product of 8192^3 by cuBLASLt, best of 12.
// Less memory is used where less is free.
absl::StatusOr<MachineRates> MeasureCudaRates(int device);

}  // namespace soloist::cuda

#endif  // SOLOIST_KERNELS_CUDA_RATES_H_
