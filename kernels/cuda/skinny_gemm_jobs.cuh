// What a launch of skinny_gemm.cuh works on: jobs. A job is one pass over one weight matrix with up to `row_tile` rows.
#ifndef SOLOIST_KERNELS_CUDA_SKINNY_GEMM_JOBS_CUH_
#define SOLOIST_KERNELS_CUDA_SKINNY_GEMM_JOBS_CUH_

#include <cuda_runtime.h>

#include <cstdint>

#include "kernels/cuda/launch.cuh"

namespace soloist::cuda::skinny {

struct Job {
  const uint8_t* w;
  int rows;       // 1..row_tile
  int run;        // which matrix
  int first_row;  // of the matrix's rows, how many earlier jobs have taken
};

// One matrix, rows 0..m-1 of x.
struct DenseJobs {
  struct Params {
    const uint8_t* w;
    int m;
  };
  struct Tables {};

  const Params& params;
  Tables& tables;

  // Whether the jobs are known before earlier kernels have ended.
  __device__ bool known_early() const { return true; }
  // Whether there is one matrix only, which will most likely have rows.
  __device__ bool one_matrix() const { return true; }
  __device__ const uint8_t* first_matrix() const { return params.w; }
  __device__ void Scan(int row_tile) { row_tile_ = row_tile; }
  __device__ int count() const { return (params.m + row_tile_ - 1) / row_tile_; }
  __device__ Job Get(int job) const {
    return {params.w, min(params.m - job * row_tile_, row_tile_), 0, job * row_tile_};
  }
  __device__ int RowIndex(const Job& job, int r) const { return job.first_row + r; }

  int row_tile_ = 0;
};

// Matrices of experts ("runs": the groups that are consecutive in the list); their rows are those of their groups.
template <int kGroups, int kRuns>
struct ExpertJobs {
  struct Group {
    const int32_t* row_count;
    uint64_t begin;  // the first row, or the address of it if kOnDevice is set
  };
  struct Run {
    const uint8_t* w;
    int32_t first_group;
  };
  static constexpr uint64_t kOnDevice = uint64_t{1} << 63;
  struct Params {
    Group groups[kGroups];
    Run runs[kRuns + 1];  // one more: the end of the last one's groups
    int num_groups;
    int num_runs;
    bool counts_final;
  };
  struct Tables {
    int begin[kGroups];
    int taken[kGroups];     // rows of the run's groups before this one
    int rows[kRuns];        // of each run
    int passes[kRuns + 1];  // jobs of the runs before this one
  };

  const Params& params;
  Tables& tables;

  __device__ bool known_early() const { return params.counts_final; }
  __device__ bool one_matrix() const { return params.num_runs == 1; }
  __device__ const uint8_t* first_matrix() const { return params.runs[0].w; }

  // All threads of the block. Counts are read past L1, which may hold those of an earlier step.
  __device__ void Scan(int row_tile) {
    for (int g = threadIdx.x; g < params.num_groups; g += blockDim.x) {
      const uint64_t begin = params.groups[g].begin;
      tables.taken[g] = __ldcg(params.groups[g].row_count);
      tables.begin[g] =
          begin & kOnDevice ? __ldcg(reinterpret_cast<const int32_t*>(begin ^ kOnDevice)) : static_cast<int>(begin);
    }
    __syncthreads();
    for (int r = threadIdx.x; r < params.num_runs; r += blockDim.x) {
      int rows = 0;
      for (int g = params.runs[r].first_group; g < params.runs[r + 1].first_group; ++g) {
        const int count = tables.taken[g];
        tables.taken[g] = rows;
        rows += count;
      }
      tables.rows[r] = rows;
    }
    __syncthreads();
    if (threadIdx.x < 32) {
      int before = 0;
      for (int r0 = 0; r0 < params.num_runs; r0 += 32) {
        const int r = r0 + static_cast<int>(threadIdx.x);
        int sum = r < params.num_runs ? (tables.rows[r] + row_tile - 1) / row_tile : 0;
        for (int d = 1; d < 32; d *= 2) {
          const int other = __shfl_up_sync(~0u, sum, d);
          if (static_cast<int>(threadIdx.x) >= d) sum += other;
        }
        if (r < params.num_runs) tables.passes[r + 1] = before + sum;
        before += __shfl_sync(~0u, sum, 31);
      }
      if (threadIdx.x == 0) tables.passes[0] = 0;
    }
    row_tile_ = row_tile;
    __syncthreads();
  }

  __device__ int count() const { return tables.passes[params.num_runs]; }

  __device__ Job Get(int job) const {
    int low = 0;
    int high = params.num_runs - 1;
    while (low < high) {  // the last run whose first job is not after `job`
      const int middle = (low + high + 1) / 2;
      if (tables.passes[middle] <= job) {
        low = middle;
      } else {
        high = middle - 1;
      }
    }
    const int first_row = (job - tables.passes[low]) * row_tile_;
    return {params.runs[low].w, min(tables.rows[low] - first_row, row_tile_), low, first_row};
  }

  // Row of x and out that is row r of the job.
  __device__ int RowIndex(const Job& job, int r) const {
    r += job.first_row;
    int g = params.runs[job.run].first_group;
    const int last = params.runs[job.run + 1].first_group - 1;
    while (g < last && tables.taken[g + 1] <= r) ++g;
    return tables.begin[g] + r - tables.taken[g];
  }

  int row_tile_ = 0;
};

}  // namespace soloist::cuda::skinny

#endif  // SOLOIST_KERNELS_CUDA_SKINNY_GEMM_JOBS_CUH_
