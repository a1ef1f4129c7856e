// What the server counts, as text that Prometheus reads. docs/metrics.md lists every name.
#ifndef SOLOIST_SERVER_METRICS_EXPORTER_H_
#define SOLOIST_SERVER_METRICS_EXPORTER_H_

#include <string>

#include "server/frontend.h"

namespace soloist {

struct ExporterOptions {
  // One series for each layer and expert instead of one for each expert: num_layers times as many.
  bool per_layer = false;
};

// Exposition format 0.0.4 (text/plain; version=0.0.4). Any thread; waits for nothing. While the model is loading, only
// what does not need an engine.
std::string PrometheusText(const Frontend& frontend, const ExporterOptions& options);

}  // namespace soloist

#endif  // SOLOIST_SERVER_METRICS_EXPORTER_H_
