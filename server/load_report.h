// What the server is doing, as one JSON object, for whoever would rather poll JSON than Prometheus text.
#ifndef SOLOIST_SERVER_LOAD_REPORT_H_
#define SOLOIST_SERVER_LOAD_REPORT_H_

#include <string>

#include "server/frontend.h"

namespace soloist {

// {model, version, state, checks: [{name, ok, message}], unix_ms, open_streams, latency: {ttft, itl: {bounds, counts}}}
// and, once the model is loaded, {device, num_ranks, running_requests, waiting_requests, steps, prompt_tokens,
// generated_tokens, preemptions, recoveries, replays, homes: [{running, waiting, total_blocks, used_blocks}],
// num_layers, num_experts, expert_rank, expert_tokens: [num_layers * num_experts]}. Counters are since start. `bounds`
// are seconds; counts[i] is the number of values above bounds[i - 1] and up to bounds[i], one more for those above all.
// Any thread; waits for nothing.
std::string LoadReport(const Frontend& frontend);

// "ready", "starting", "degraded", "draining", "not_ready"
const char* ServerStateName(ServerState state);

}  // namespace soloist

#endif  // SOLOIST_SERVER_LOAD_REPORT_H_
