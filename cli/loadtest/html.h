// A load test's results as one HTML page that asks for nothing else: no script, no outside reference.
#ifndef SOLOIST_CLI_LOADTEST_HTML_H_
#define SOLOIST_CLI_LOADTEST_HTML_H_

#include <span>
#include <string>
#include <utility>
#include <vector>

#include "cli/loadtest/metrics.h"

namespace soloist::cli {

struct Series {
  std::string name;
  std::vector<std::pair<double, double>> points;  // x, y; both 0 or more
};

// Lines over one pair of axes that begin at 0.
struct Plot {
  std::string title, x_label, y_label;
  std::vector<Series> series;
  bool markers = false;  // a dot per point, with its values as a tooltip
};

// Cumulative distributions of TTFT, TPOT, ITL and latency of the ok requests; output tokens/s over time of all.
std::vector<Plot> RunPlots(std::span<const RequestRecord> records);

struct LoadPoint {
  double load;
  bool sustained;
  Summary summary;
};
// TTFT and TPOT over load, goodput over load, latency over throughput. `load_name` is the x axis of the first ones.
std::vector<Plot> SweepPlots(std::span<const LoadPoint> points, const std::string& load_name);

struct Page {
  std::string title;
  std::vector<std::pair<std::string, std::string>> facts;  // name and value of what stands on top
  std::vector<std::vector<std::string>> table;             // the first row is its head
  std::vector<Plot> plots;
  std::string notes;  // preformatted
};
// The rows of kDistributions.
std::vector<std::vector<std::string>> DistributionTable(const Summary& summary);
// All texts are escaped.
std::string ToHtml(const Page& page);

}  // namespace soloist::cli

#endif  // SOLOIST_CLI_LOADTEST_HTML_H_
