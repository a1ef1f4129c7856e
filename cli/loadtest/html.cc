#include "cli/loadtest/html.h"

#include <algorithm>
#include <cmath>
#include <optional>
#include <string_view>

#include "cli/loadtest/report.h"
#include "fmt/format.h"

namespace soloist::cli {
namespace {

constexpr double kWidth = 440, kHeight = 200, kLeft = 58, kTop = 34, kBottom = 40, kRight = 16;
constexpr size_t kMaxPoints = 500;
constexpr int kColours = 4;
constexpr std::string_view kStyle = R"(
:root{color-scheme:light dark;--ground:#fff;--panel:#f6f7f9;--ink:#1c2026;--soft:#5d6673;--line:#d9dde3;
--s0:#2563c9;--s1:#c2410c;--s2:#0f766e;--s3:#7e3fb8}
@media(prefers-color-scheme:dark){:root{--ground:#14171c;--panel:#1d2128;--ink:#e6e9ee;--soft:#9aa4b2;--line:#363c47;
--s0:#7aa9f7;--s1:#f59e6b;--s2:#5cc9bb;--s3:#c79bf0}}
body{font:15px/1.45 system-ui,sans-serif;margin:0 auto;padding:1.5rem;max-width:1120px;background:var(--ground);color:var(--ink)}
h1{font-size:1.35rem;margin:0 0 1rem}
.facts{display:grid;grid-template-columns:repeat(auto-fill,minmax(170px,1fr));gap:.6rem;margin:0 0 1.2rem}
.facts div{background:var(--panel);border-radius:6px;padding:.5rem .75rem}
.facts dt{color:var(--soft);font-size:.8rem}.facts dd{margin:0;font-size:1.15rem;font-variant-numeric:tabular-nums}
.plots{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(420px,100%),1fr));gap:.8rem;margin:0 0 1.2rem}
figure{margin:0;background:var(--panel);border-radius:6px;padding:.5rem}
svg{width:100%;height:auto;display:block;fill:var(--ink);font:12px system-ui,sans-serif}
.name{font-weight:600;font-size:14px}.tick{fill:var(--soft);font-size:11px}.grid{stroke:var(--line);fill:none}
polyline{fill:none;stroke-width:1.8;stroke-linejoin:round}
.s0{stroke:var(--s0);fill:var(--s0)}.s1{stroke:var(--s1);fill:var(--s1)}.s2{stroke:var(--s2);fill:var(--s2)}
.s3{stroke:var(--s3);fill:var(--s3)}polyline.s0,polyline.s1,polyline.s2,polyline.s3{fill:none}
.key{stroke:none;font-size:12px}
.wide{overflow-x:auto}table{border-collapse:collapse;font-variant-numeric:tabular-nums;font-size:.88rem;width:100%}
th,td{text-align:right;padding:.25rem .6rem;border-bottom:1px solid var(--line);white-space:nowrap}
th:first-child,td:first-child{text-align:left}th{color:var(--soft);font-weight:600}
pre{white-space:pre-wrap;color:var(--soft);font-size:.82rem}
)";

std::string Escape(std::string_view text) {
  std::string out;
  for (const char c : text) {
    switch (c) {
      case '&':
        out += "&amp;";
        break;
      case '<':
        out += "&lt;";
        break;
      case '>':
        out += "&gt;";
        break;
      case '"':
        out += "&quot;";
        break;
      default:
        out += c;
    }
  }
  return out;
}

// 1, 2 or 5 times a power of ten, so that at most five of them reach `max`.
double TickStep(double max) {
  const double power = std::pow(10, std::floor(std::log10(max / 5)));
  for (const double factor : {1.0, 2.0, 5.0, 10.0}) {
    if (max / (factor * power) <= 5 + 1e-9) return factor * power;
  }
  return max;
}

std::string Axes(const Plot& plot, double max_x, double max_y) {
  std::string out;
  for (double x = 0, step = TickStep(max_x); x <= max_x * (1 + 1e-9); x += step) {
    const double at = kLeft + x / max_x * kWidth;
    out += fmt::format(
        "<path class=\"grid\" d=\"M{0:.1f} {1}V{2}\"/><text class=\"tick\" x=\"{0:.1f}\" y=\"{3}\" "
        "text-anchor=\"middle\">{4:g}</text>",
        at, kTop, kTop + kHeight, kTop + kHeight + 15, x);
  }
  for (double y = 0, step = TickStep(max_y); y <= max_y * (1 + 1e-9); y += step) {
    const double at = kTop + (1 - y / max_y) * kHeight;
    out += fmt::format(
        "<path class=\"grid\" d=\"M{0} {1:.1f}H{2}\"/><text class=\"tick\" x=\"{3}\" y=\"{4:.1f}\" "
        "text-anchor=\"end\">{5:g}</text>",
        kLeft, at, kLeft + kWidth, kLeft - 6, at + 4, y);
  }
  out += fmt::format("<text class=\"tick\" x=\"{}\" y=\"{}\" text-anchor=\"middle\">{}</text>", kLeft + kWidth / 2,
                     kTop + kHeight + 33, Escape(plot.x_label));
  return out + fmt::format("<text class=\"name\" x=\"8\" y=\"18\">{} <tspan class=\"tick\">{}</tspan></text>\n",
                           Escape(plot.title), Escape(plot.y_label));
}

std::string ToSvg(const Plot& plot) {
  double max_x = 0, max_y = 0;
  for (const Series& series : plot.series) {
    for (const auto& [x, y] : series.points) {
      max_x = std::max(max_x, x);
      max_y = std::max(max_y, y);
    }
  }
  if (max_x <= 0 || max_y <= 0) return fmt::format("<figure>{}: no values</figure>\n", Escape(plot.title));
  std::string out = fmt::format("<figure><svg viewBox=\"0 0 {} {}\" role=\"img\" aria-label=\"{}\">\n",
                                kLeft + kWidth + kRight, kTop + kHeight + kBottom, Escape(plot.title));
  out += Axes(plot, max_x, max_y);
  double key_x = kLeft + kWidth;
  for (size_t i = plot.series.size(); i-- > 0;) {
    const Series& series = plot.series[i];
    const int colour = static_cast<int>(i) % kColours;
    std::string line, dots;
    for (const auto& [x, y] : series.points) {
      const double at_x = kLeft + x / max_x * kWidth, at_y = kTop + (1 - y / max_y) * kHeight;
      line += fmt::format("{:.1f},{:.1f} ", at_x, at_y);
      if (plot.markers) {
        dots += fmt::format(
            "<circle class=\"s{}\" cx=\"{:.1f}\" cy=\"{:.1f}\" r=\"3\"><title>{} {}: {:.4g}, {:.4g}</title></circle>",
            colour, at_x, at_y, Escape(plot.title), Escape(series.name), x, y);
      }
    }
    out += fmt::format("<polyline class=\"s{}\" points=\"{}\"/>{}\n", colour, line, dots);
    if (plot.series.size() > 1) {
      out += fmt::format("<text class=\"s{} key\" x=\"{:.0f}\" y=\"18\" text-anchor=\"end\">{}</text>\n", colour, key_x,
                         Escape(series.name));
      key_x -= 12 + 7 * static_cast<double>(series.name.size());
    }
  }
  return out + "</svg></figure>\n";
}

// x: value, y: percent of the values that are not above it.
Plot Cumulative(const std::string& title, std::vector<double> values) {
  std::ranges::sort(values);
  Series series;
  const size_t step = std::max<size_t>(1, values.size() / kMaxPoints);
  for (size_t i = 0; i < values.size(); i += step) {
    series.points.emplace_back(values[i], 100.0 * static_cast<double>(i + 1) / static_cast<double>(values.size()));
  }
  if (!values.empty()) series.points.emplace_back(values.back(), 100);
  return {.title = title, .x_label = "ms", .y_label = "% at or below", .series = {std::move(series)}};
}

// Tokens/s in each hundredth of the run.
Plot TokenRate(std::span<const RequestRecord> records) {
  int64_t first_ns = 0, last_ns = 0;
  for (const RequestRecord& record : records) {
    if (first_ns == 0 || record.intended_ns < first_ns) first_ns = record.intended_ns;
    last_ns = std::max(last_ns, record.end_ns);
  }
  constexpr int kBins = 100;
  const double bin_s = std::max(static_cast<double>(last_ns - first_ns) * 1e-9, 1e-9) / kBins;
  std::vector<double> tokens(kBins, 0);
  for (const RequestRecord& record : records) {
    for (const Chunk& chunk : record.chunks) {
      const auto bin = static_cast<int>(static_cast<double>(chunk.ns - first_ns) * 1e-9 / bin_s);
      tokens[std::clamp(bin, 0, kBins - 1)] += chunk.tokens;
    }
  }
  Series series;
  for (int i = 0; i < kBins; ++i) series.points.emplace_back((i + 0.5) * bin_s, tokens[i] / bin_s);
  return {.title = "Output tokens/s", .x_label = "s", .y_label = "over time", .series = {std::move(series)}};
}

}  // namespace

std::vector<Plot> RunPlots(std::span<const RequestRecord> records) {
  std::vector<double> ttft, tpot, itl, latency;
  for (const RequestRecord& record : records) {
    if (!record.ok()) continue;
    latency.push_back(LatencyMs(record));
    if (const auto ms = TtftMs(record)) ttft.push_back(*ms);
    if (const auto ms = TpotMs(record)) tpot.push_back(*ms);
    AppendItlMs(record, itl);
  }
  return {Cumulative("TTFT", std::move(ttft)), Cumulative("TPOT", std::move(tpot)), Cumulative("ITL", std::move(itl)),
          Cumulative("Latency", std::move(latency)), TokenRate(records)};
}

std::vector<Plot> SweepPlots(std::span<const LoadPoint> points, const std::string& load_name) {
  std::vector<LoadPoint> sorted(points.begin(), points.end());
  std::ranges::sort(sorted, {}, &LoadPoint::load);
  // x and y of each point, by functions.
  const auto series = [&](const std::string& name, const auto& x, const auto& y) {
    Series out{.name = name};
    for (const LoadPoint& point : sorted) out.points.emplace_back(x(point), y(point));
    return out;
  };
  const auto load = [](const LoadPoint& p) { return p.load; };
  const auto output = [](const LoadPoint& p) { return p.summary.output_tokens_per_s; };
  const auto ttft = [](const LoadPoint& p) { return p.summary.ttft_ms.median; };
  const auto ttft99 = [](const LoadPoint& p) { return p.summary.ttft_ms.p99; };
  const auto tpot = [](const LoadPoint& p) { return p.summary.tpot_ms.median; };
  const auto tpot99 = [](const LoadPoint& p) { return p.summary.tpot_ms.p99; };
  const auto good = [](const LoadPoint& p) { return p.summary.goodput_per_s; };
  const auto all = [](const LoadPoint& p) { return p.summary.requests_per_s; };
  return {{.title = "TTFT over load",
           .x_label = load_name,
           .y_label = "ms",
           .series = {series("median", load, ttft), series("p99", load, ttft99)},
           .markers = true},
          {.title = "TPOT over load",
           .x_label = load_name,
           .y_label = "ms",
           .series = {series("median", load, tpot), series("p99", load, tpot99)},
           .markers = true},
          {.title = "TPOT over throughput",
           .x_label = "output tokens/s",
           .y_label = "ms",
           .series = {series("median", output, tpot), series("p99", output, tpot99)},
           .markers = true},
          {.title = "Requests/s over load",
           .x_label = load_name,
           .y_label = "requests/s",
           .series = {series("goodput", load, good), series("ok", load, all)},
           .markers = true}};
}

std::vector<std::vector<std::string>> DistributionTable(const Summary& summary) {
  std::vector<std::vector<std::string>> out = {{"", "count", "mean", "median", "p90", "p99", "p99.9", "max"}};
  for (const auto& [name, value] : kDistributions) {
    const Distribution& d = summary.*value;
    if (d.count == 0) continue;
    std::vector<std::string> row = {name, fmt::format("{}", d.count)};
    for (const double ms : {d.mean, d.median, d.p90, d.p99, d.p999, d.max}) row.push_back(fmt::format("{:.3f}", ms));
    out.push_back(std::move(row));
  }
  return out;
}

std::string ToHtml(const Page& page) {
  std::string out =
      "<!DOCTYPE html>\n<html lang=\"en\"><head><meta charset=\"utf-8\"><meta name=\"viewport\" "
      "content=\"width=device-width, initial-scale=1\"><title>" +
      Escape(page.title) + "</title><style>" + std::string(kStyle) + "</style></head><body>\n<h1>" +
      Escape(page.title) + "</h1>\n<dl class=\"facts\">\n";
  for (const auto& [name, value] : page.facts) {
    out += "<div><dt>" + Escape(name) + "</dt><dd>" + Escape(value) + "</dd></div>\n";
  }
  out += "</dl>\n<div class=\"plots\">\n";
  for (const Plot& plot : page.plots) out += ToSvg(plot);
  out += "</div>\n<div class=\"wide\"><table>\n";
  for (size_t i = 0; i < page.table.size(); ++i) {
    const char* cell = i == 0 ? "th" : "td";
    out += "<tr>";
    for (const std::string& text : page.table[i]) out += fmt::format("<{0}>{1}</{0}>", cell, Escape(text));
    out += "</tr>\n";
  }
  return out + "</table></div>\n<pre>" + Escape(page.notes) + "</pre></body></html>\n";
}

}  // namespace soloist::cli
