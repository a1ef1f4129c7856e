#include "cli/bench_serve_flags.h"

namespace soloist::cli {

bool ServeBenchFlags::OverHttp() const {
  return backend == "openai" || (backend == "auto" && address.find("://") != std::string::npos);
}

void ServeBenchFlags::AddTo(CLI::App& app) {
  app.add_option("--address", address, "HOST:PORT (gRPC) or http://HOST:PORT[/PREFIX] (OpenAI)")->capture_default_str();
  app.add_option("--backend", backend, "grpc, openai, or auto: by the address")
      ->check(CLI::IsMember({"auto", "grpc", "openai"}))
      ->capture_default_str();
  app.add_option("--endpoint", endpoint, "OpenAI: completions (token ids) or chat (text)")
      ->check(CLI::IsMember({"completions", "chat"}))
      ->capture_default_str();
  app.add_option("--model", http.model, "OpenAI: default: the first of /v1/models");
  app.add_option("--extra-body", http.extra_body,
                 "OpenAI: JSON object merged into each request; null takes a field out");
  app.add_option("--header", http.headers, "OpenAI: 'Name: value' with each request; repeatable");
  app.add_option("--client-threads", http.threads, "OpenAI: that send and receive")
      ->check(CLI::Range(1, 64))
      ->capture_default_str();
  app.add_option("--connections", connections,
                 "gRPC: used in turn (default 4); OpenAI: opened ahead (default: as many as requests in flight)")
      ->check(CLI::Range(1, 65536));

  app.add_option("--preset", preset, "reference-batch: 128 requests of 10,000 prompt tokens")
      ->check(CLI::IsMember({"reference-batch"}));
  app.add_option("--requests", workload.count, "how many; default: until --duration, else 100; with --trace, at most")
      ->check(CLI::PositiveNumber);
  app.add_option("--duration", duration_s, "seconds for which requests are sent; those in flight are waited for")
      ->check(CLI::PositiveNumber);
  app.add_option("--input-length", workload.input_length,
                 "tokens: N, uniform:LOW:HIGH, normal:MEAN:STDDEV or lognormal:MEDIAN:SIGMA")
      ->capture_default_str();
  app.add_option("--output-length", workload.output_length, "tokens, likewise; end tokens are ignored")
      ->capture_default_str();
  app.add_option("--prefix-length", workload.prefix_length, "tokens that prompts share, ahead of their own")
      ->check(CLI::NonNegativeNumber)
      ->capture_default_str();
  app.add_option("--prefixes", workload.num_prefixes, "different shared prefixes")
      ->check(CLI::PositiveNumber)
      ->capture_default_str();
  app.add_option("--vocab-size", workload.vocab_size, "prompts' token ids are below; default: the server's, else 256")
      ->check(CLI::PositiveNumber);
  auto* trace_option =
      app.add_option("--trace", trace, "JSON lines with timestamp (ms), input_length, output_length, hash_ids");
  app.add_option("--trace-speed", trace_speed, "2: twice as fast")->check(CLI::PositiveNumber)->capture_default_str();
  app.add_option("--dataset", dataset, "ShareGPT-like JSON or JSON lines: conversations, or prompt and output_len")
      ->excludes(trace_option);

  auto* rate_option =
      app.add_option(
             "--rate", rate,
             "requests/s, whatever the server does: R, or stages R:SECONDS,A-B:SECONDS (ramp); default: all at once")
          ->excludes(trace_option);
  app.add_option("--burstiness", burstiness, "shape of the gamma gaps: 1 Poisson, less: bursts")
      ->check(CLI::PositiveNumber)
      ->capture_default_str();
  auto* concurrency_option =
      app.add_option("--concurrency", concurrency, "that many requests in flight, always: N, or stages as --rate")
          ->excludes(rate_option)
          ->excludes(trace_option);
  auto* goodput_option = app.add_option("--goodput", goodput, "objectives in ms: ttft:200,tpot:20,e2e:5000");
  app.add_option("--sweep", sweep, "finds the highest sustained load: rate:LOW:HIGH or concurrency:LOW:HIGH")
      ->excludes(rate_option)
      ->excludes(concurrency_option)
      ->excludes(trace_option)
      ->needs(goodput_option);
  app.add_option("--sweep-share", sweep_share, "of requests that must meet the objectives (0.99: their p99)")
      ->check(CLI::Range(0.0, 1.0))
      ->capture_default_str();
  app.add_option("--sweep-precision", sweep_precision, "the search ends within that share of the knee")
      ->check(CLI::Range(0.001, 1.0))
      ->capture_default_str();
  app.add_option("--cancel-share", cancel_share, "of requests that hang up after half of their tokens")
      ->check(CLI::Range(0.0, 1.0))
      ->capture_default_str();
  app.add_option("--warmup", warmup, "requests ahead that do not count; at least 8 before each point of a sweep")
      ->check(CLI::NonNegativeNumber)
      ->capture_default_str();
  app.add_option("--seed", workload.seed, "of prompts, lengths, arrivals and cancellations")->capture_default_str();
  app.add_option("--max-lag-ms", max_lag_ms, "the run is invalid if the client sends later than that (p99)")
      ->check(CLI::PositiveNumber)
      ->capture_default_str();

  app.add_flag("--no-progress", no_progress, "no live line (there is none anyway where stderr is no terminal)");
  app.add_option("--json", json, "file: everything, each request too (of a sweep: each point)");
  app.add_option("--csv", csv, "file: one line per request (of a sweep: those at the knee)");
  app.add_option("--html", html, "file: a page with tables and plots, complete in itself");
}

void ServeBenchFlags::NoteGiven(const CLI::App& app) {
  for (const CLI::Option* option : app.get_options()) {
    if (option->get_name() == "--help") continue;
    std::string value = option->get_default_str();
    if (option->count() > 0) value = CLI::detail::join(option->results(), " ");
    given.emplace_back(option->get_name(), std::move(value));
  }
}

}  // namespace soloist::cli
