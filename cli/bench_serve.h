// soloist bench serve and soloist bench compare: see docs/bench.md.
#ifndef SOLOIST_CLI_BENCH_SERVE_H_
#define SOLOIST_CLI_BENCH_SERVE_H_

#include "CLI/CLI.hpp"

namespace soloist::cli {

// Each adds itself to `bench`; `exit_code` is what the process ends with.
void AddBenchServe(CLI::App& bench, int& exit_code);
void AddBenchCompare(CLI::App& bench, int& exit_code);

}  // namespace soloist::cli

#endif  // SOLOIST_CLI_BENCH_SERVE_H_
