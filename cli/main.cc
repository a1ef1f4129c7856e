// The one binary: soloist serve | worker | demo | generate | bench | inspect.
#include "CLI/CLI.hpp"
#include "base/logging.h"
#include "cli/flags.h"
#include "server/version.h"

int main(int argc, char** argv) {
  CLI::App app{"Soloist: a Mixture-of-Experts inference server in which each rank owns at most one expert per layer"};
  app.name("soloist");
  app.set_version_flag("--version", soloist::kVersion);
  app.require_subcommand(1);
  app.fallthrough();
  soloist::LogOptions log;
  app.add_option("--log-level", log.level, "trace, debug, info, warn, error, off")->capture_default_str();
  app.add_option("--log-format", log.format, "text or json")->capture_default_str();
  app.parse_complete_callback([&log] {
    const absl::Status status = soloist::InitLogging(log);
    if (!status.ok()) throw CLI::ValidationError(std::string(status.message()));
  });

  int exit_code = 0;
  soloist::cli::AddServe(app, exit_code);
  soloist::cli::AddDemo(app, exit_code);
  soloist::cli::AddGenerate(app, exit_code);
  soloist::cli::AddBench(app, exit_code);
  soloist::cli::AddWorker(app, exit_code);
  soloist::cli::AddInspect(app, exit_code);
  CLI11_PARSE(app, argc, argv);
  return exit_code;
}
