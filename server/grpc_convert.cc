#include "server/grpc_convert.h"

#include <string>
#include <string_view>
#include <utility>
#include <variant>

#include "server/version.h"

namespace soloist {
namespace {

template <typename Message, typename T>
std::optional<T> Given(const Message& message, bool (Message::*has)() const, T (Message::*get)() const) {
  if (!(message.*has)()) return std::nullopt;
  return (message.*get)();
}

v1::FinishReason ToProto(FinishReason reason) {
  switch (reason) {
    case FinishReason::kStop:
      return v1::FINISH_REASON_STOP;
    case FinishReason::kLength:
      return v1::FINISH_REASON_LENGTH;
    case FinishReason::kCancelled:
      return v1::FINISH_REASON_CANCELLED;
    case FinishReason::kError:
      return v1::FINISH_REASON_ERROR;
    case FinishReason::kNone:
      break;
  }
  return v1::FINISH_REASON_UNSPECIFIED;
}

v1::HealthState ToProto(ServerState state) {
  switch (state) {
    case ServerState::kStarting:
      return v1::HEALTH_STATE_STARTING;
    case ServerState::kReady:
      return v1::HEALTH_STATE_READY;
    case ServerState::kDegraded:
      return v1::HEALTH_STATE_DEGRADED;
    case ServerState::kDraining:
      return v1::HEALTH_STATE_DRAINING;
    case ServerState::kNotReady:
      break;
  }
  return v1::HEALTH_STATE_NOT_READY;
}

void SetTiming(const RequestTimes& times, const Frontend& frontend, v1::Timing& out) {
  out.set_arrival_unix_ns(frontend.UnixNs(times.arrival_ns));
  out.set_first_scheduled_unix_ns(frontend.UnixNs(times.first_scheduled_ns));
  out.set_first_token_unix_ns(frontend.UnixNs(times.first_token_ns));
  out.set_last_token_unix_ns(frontend.UnixNs(times.last_token_ns));
  if (times.first_scheduled_ns != 0) out.set_queue_ns(times.first_scheduled_ns - times.arrival_ns);
  if (times.first_token_ns == 0) return;
  out.set_time_to_first_token_ns(times.first_token_ns - times.arrival_ns);
  out.set_decode_ns(times.last_token_ns - times.first_token_ns);
  out.set_total_ns(times.last_token_ns - times.arrival_ns);
}

void SetLogprob(int32_t token, float logprob, const Tokenizer& tokenizer, v1::Logprob& out) {
  const std::string_view bytes = tokenizer.TokenBytes(token);
  out.set_token_id(token);
  out.set_logprob(logprob);
  out.set_token_bytes(bytes.data(), bytes.size());
}

void SetDelta(const Delta& delta, bool logprobs, const Frontend& frontend, v1::OutputDelta& out) {
  out.set_output_index(delta.output_index);
  out.set_text(delta.text);
  for (const TokenEvent& event : delta.tokens) {
    out.add_token_ids(event.token);
    if (logprobs) {
      v1::TokenLogprobs& entry = *out.add_logprobs();
      SetLogprob(event.token, event.logprob, frontend.tokenizer(), *entry.mutable_chosen());
      for (const auto& [token, logprob] : event.top_logprobs) {
        SetLogprob(token, logprob, frontend.tokenizer(), *entry.add_top());
      }
    }
    if (!event.logits.empty()) out.add_logits()->mutable_values()->Add(event.logits.begin(), event.logits.end());
  }
}

void SetPromptLogprobs(const PromptLogprobs& scores, const Tokenizer& tokenizer, v1::PromptLogprobs& out) {
  out.set_first_index(scores.first);
  for (int32_t i = 0; i < scores.size(); ++i) {
    v1::TokenLogprobs& entry = *out.add_logprobs();
    SetLogprob(scores.tokens[i], scores.logprobs[i], tokenizer, *entry.mutable_chosen());
    for (int32_t at = i * scores.num_top; at < (i + 1) * scores.num_top && scores.top_tokens[at] >= 0; ++at) {
      SetLogprob(scores.top_tokens[at], scores.top_logprobs[at], tokenizer, *entry.add_top());
    }
  }
}

void SetFinished(const OutputEnd& end, const Frontend& frontend, v1::OutputFinished& out) {
  out.set_output_index(end.output_index);
  out.set_reason(ToProto(end.reason));
  if (end.reason == FinishReason::kStop) {
    if (end.stop_string.has_value()) {
      out.set_stop_string(*end.stop_string);
    } else if (end.stop_token.has_value()) {
      out.set_stop_token_id(*end.stop_token);
    }
  }
  out.set_output_tokens(end.output_tokens);
  if (end.reason == FinishReason::kError) {
    out.mutable_error()->set_code(static_cast<int32_t>(end.error.code()));
    out.mutable_error()->set_message(std::string(end.error.message()));
    out.mutable_error()->set_retryable(end.retryable);
  }
  SetTiming(end.times, frontend, *out.mutable_timing());
}

OutputForm FormFromProto(const v1::ResponseFormat& format) {
  using Format = v1::ResponseFormat;
  using Kind = OutputForm::Kind;
  switch (format.format_case()) {
    case Format::kJsonObject:
      return {.kind = Kind::kJsonObject, .text = {}, .choices = {}};
    case Format::kJsonSchema:
      return {.kind = Kind::kJsonSchema, .text = format.json_schema(), .choices = {}};
    case Format::kRegex:
      return {.kind = Kind::kRegex, .text = format.regex(), .choices = {}};
    case Format::kChoice:
      return {.kind = Kind::kChoice,
              .text = {},
              .choices = {format.choice().texts().begin(), format.choice().texts().end()}};
    case Format::kGrammar:
      return {.kind = Kind::kGrammar, .text = format.grammar(), .choices = {}};
    case Format::FORMAT_NOT_SET:
      break;
  }
  return {};
}

}  // namespace

grpc::Status ToGrpc(const absl::Status& status) {
  return {static_cast<grpc::StatusCode>(status.code()), std::string(status.message())};
}

GenerationRequest FromProto(const v1::GenerateRequest& r) {
  using R = v1::GenerateRequest;
  using S = v1::SamplingParams;
  GenerationRequest out;
  if (r.has_request_id()) out.request_id = r.request_id();
  if (r.prompt_case() == R::kText) {
    out.prompt = r.text();
  } else if (r.prompt_case() == R::kTokenIds) {
    out.prompt = std::vector<int32_t>(r.token_ids().ids().begin(), r.token_ids().ids().end());
  }
  out.add_special_tokens = Given(r, &R::has_add_special_tokens, &R::add_special_tokens).value_or(true);
  out.parse_special_tokens = Given(r, &R::has_parse_special_tokens, &R::parse_special_tokens).value_or(true);
  out.n = Given(r, &R::has_n, &R::n);
  const S& s = r.sampling();
  out.temperature = Given(s, &S::has_temperature, &S::temperature);
  out.top_p = Given(s, &S::has_top_p, &S::top_p);
  out.min_p = Given(s, &S::has_min_p, &S::min_p);
  out.top_k = Given(s, &S::has_top_k, &S::top_k);
  out.repetition_penalty = Given(s, &S::has_repetition_penalty, &S::repetition_penalty);
  out.presence_penalty = Given(s, &S::has_presence_penalty, &S::presence_penalty);
  out.frequency_penalty = Given(s, &S::has_frequency_penalty, &S::frequency_penalty);
  out.seed = Given(s, &S::has_seed, &S::seed);
  for (const v1::LogitBias& bias : s.logit_bias()) out.logit_bias.emplace_back(bias.token_id(), bias.bias());
  out.max_tokens = Given(s, &S::has_max_tokens, &S::max_tokens);
  out.min_tokens = Given(s, &S::has_min_tokens, &S::min_tokens);
  const v1::StopParams& stop = r.stop();
  out.stop_strings.assign(stop.strings().begin(), stop.strings().end());
  out.stop_token_ids.assign(stop.token_ids().begin(), stop.token_ids().end());
  out.include_stop = stop.include_in_output();
  out.ignore_eos = stop.ignore_eos();
  out.logprobs = Given(r, &R::has_logprobs, &R::logprobs);
  out.prompt_logprobs = Given(r, &R::has_prompt_logprobs, &R::prompt_logprobs);
  out.priority = Given(r, &R::has_priority, &R::priority);
  out.cache_salt = r.cache_salt();
  out.skip_special_tokens = Given(r, &R::has_skip_special_tokens, &R::skip_special_tokens).value_or(true);
  out.return_logits = r.return_logits();
  if (r.has_response_format()) out.output_form = FormFromProto(r.response_format());
  return out;
}

v1::GenerateResponse ToProto(const StreamEvent& event, bool logprobs, const Frontend& frontend) {
  v1::GenerateResponse out;
  if (const auto* delta = std::get_if<Delta>(&event)) {
    SetDelta(*delta, logprobs, frontend, *out.mutable_delta());
  } else if (const auto* end = std::get_if<OutputEnd>(&event)) {
    SetFinished(*end, frontend, *out.mutable_finished());
  } else if (const auto* scores = std::get_if<PromptLogprobs>(&event)) {
    SetPromptLogprobs(*scores, frontend.tokenizer(), *out.mutable_prompt_logprobs());
  } else {
    const auto& all = std::get<RequestEnd>(event);
    v1::Usage& usage = *out.mutable_completed()->mutable_usage();
    usage.set_prompt_tokens(all.prompt_tokens);
    usage.set_cached_prompt_tokens(all.cached_prompt_tokens);
    usage.set_output_tokens(all.output_tokens);
    usage.set_preemptions(all.preemptions);
    SetTiming(all.times, frontend, *out.mutable_completed()->mutable_timing());
  }
  return out;
}

v1::HealthResponse ToProto(const HealthReport& report) {
  v1::HealthResponse out;
  out.set_state(ToProto(report.state));
  for (const HealthReport::Check& check : report.checks) {
    v1::HealthCheck& entry = *out.add_checks();
    entry.set_name(check.name);
    entry.set_ok(check.ok);
    entry.set_message(check.message);
    if (check.last_step_age_ns.has_value()) entry.set_last_step_age_ns(*check.last_step_age_ns);
    if (check.busy_ns.has_value()) entry.set_busy_ns(*check.busy_ns);
  }
  return out;
}

v1::GetLoadResponse LoadToProto(const LoadSnapshot& load, const Frontend& frontend) {
  const Engine& engine = *frontend.engine();
  const EngineInfo& info = engine.Info();
  const int64_t now_ns = frontend.clock().NowNs();
  v1::GetLoadResponse out;
  for (const LoadSnapshot::Home& home : load.homes) {
    v1::HomeLoad& entry = *out.add_homes();
    entry.set_running_sequences(home.running_sequences);
    entry.set_waiting_sequences(home.waiting_sequences);
    entry.set_total_blocks(home.total_blocks);
    entry.set_used_blocks(home.used_blocks);
    entry.set_cached_blocks(home.cached_blocks);
  }
  for (const RankStatus& rank : engine.Ranks()) {
    v1::RankLoad& entry = *out.add_ranks();
    entry.set_rank(rank.rank);
    entry.set_last_step(rank.last_step);
    if (rank.busy_since_ns != 0) entry.set_busy_ns(std::max<int64_t>(1, now_ns - rank.busy_since_ns));
  }
  for (int e = 0; e < info.num_experts; ++e) {
    v1::ExpertLoad& entry = *out.add_experts();
    entry.set_expert(e);
    entry.set_rank(info.expert_rank[e]);
    int64_t total = 0;
    for (int l = 0; l < info.num_layers; ++l) {
      const size_t i = static_cast<size_t>(l) * info.num_experts + e;
      const int64_t tokens = i < load.expert_tokens.size() ? load.expert_tokens[i] : 0;
      entry.add_tokens_per_layer(tokens);
      total += tokens;
    }
    if (info.expert_rank[e] < out.ranks_size()) {
      v1::RankLoad& owner = *out.mutable_ranks(info.expert_rank[e]);
      owner.set_expert_tokens(owner.expert_tokens() + total);
    }
  }
  out.set_running_requests(load.running_requests);
  out.set_waiting_requests(load.waiting_requests);
  out.set_open_streams(frontend.open_streams());
  out.set_steps(load.steps);
  out.set_prompt_tokens(load.prompt_tokens);
  out.set_generated_tokens(load.generated_tokens);
  out.set_prefix_cache_queries(load.prefix_cache_queries);
  out.set_prefix_cache_hits(load.prefix_cache_hits);
  out.set_preemptions(load.preemptions);
  out.set_recoveries(load.recoveries);
  out.set_requeued_sequences(load.requeued_sequences);
  out.set_replays(load.replays);
  out.set_finished_requests(load.finished_requests);
  out.set_last_step_device_ns(load.last_step_device_ns);
  out.set_schedule_ns(load.schedule_ns);
  const GrammarStats grammar = frontend.grammar_stats();
  v1::StructuredOutputLoad& structured = *out.mutable_structured_output();
  structured.set_compiled(grammar.compiled);
  structured.set_compile_ns(grammar.compile_ns);
  structured.set_cache_hits(grammar.cache_hits);
  structured.set_cached_bytes(grammar.cached_bytes);
  structured.set_masks(grammar.masks);
  structured.set_mask_ns(grammar.mask_ns);
  structured.set_slowest_mask_ns(grammar.slowest_mask_ns);
  return out;
}

v1::GetServerInfoResponse ServerInfoToProto(const Frontend& frontend) {
  v1::GetServerInfoResponse out;
  out.set_version(kVersion);
  out.set_schema_revision(kSchemaRevision);
  out.set_start_unix_ns(frontend.start_unix_ns());
  const ServerLimits& limits = frontend.limits();
  v1::Limits& l = *out.mutable_limits();
  l.set_max_message_bytes(limits.max_message_bytes);
  l.set_max_prompt_bytes(limits.max_prompt_bytes);
  l.set_max_n(limits.max_n);
  l.set_max_logprobs(kMaxTopLogprobs);
  l.set_max_stop_strings(limits.max_stop_strings);
  l.set_max_stop_string_bytes(limits.max_stop_string_bytes);
  l.set_max_stop_token_ids(limits.max_stop_token_ids);
  l.set_max_logit_bias(limits.max_logit_bias);
  l.set_max_streams(limits.max_streams);
  l.set_max_buffered_bytes(limits.max_buffered_bytes);
  l.set_max_buffered_tokens(limits.max_buffered_tokens);
  l.set_max_response_format_bytes(limits.output_form.max_bytes);
  l.set_max_choices(limits.output_form.max_choices);
  const Engine* engine = frontend.engine();
  if (engine == nullptr) return out;
  const EngineInfo& info = engine->Info();
  v1::Capacity& c = *out.mutable_capacity();
  c.set_max_model_len(info.limits.max_model_len);
  c.set_kv_blocks(info.limits.num_blocks);
  c.set_block_size(info.limits.block_size);
  c.set_max_tokens_per_step(info.limits.max_tokens);
  c.set_max_sequences(info.limits.max_sequences);
  c.set_kv_bytes_per_token(info.kv_bytes_per_token);
  c.set_weight_bytes_per_rank(info.weight_bytes_per_rank);
  v1::ParallelLayout& p = *out.mutable_layout();
  p.set_num_ranks(info.num_ranks);
  p.set_num_homes(info.num_homes);
  p.set_num_layers(info.num_layers);
  p.set_num_experts(info.num_experts);
  p.set_experts_per_token(info.experts_per_token);
  p.mutable_expert_rank()->Add(info.expert_rank.begin(), info.expert_rank.end());
  p.set_device(info.device);
  return out;
}

v1::GetModelInfoResponse ModelInfoToProto(const Frontend& frontend) {
  const ModelDescription& model = frontend.model();
  v1::GetModelInfoResponse out;
  out.set_name(model.name);
  out.set_architecture(model.architecture);
  if (const Engine* engine = frontend.engine()) {
    out.set_vocab_size(engine->Info().limits.vocab_size);
    out.set_max_model_len(engine->Info().limits.max_model_len);
  }
  out.mutable_eos_token_ids()->Add(model.eos_token_ids.begin(), model.eos_token_ids.end());
  if (frontend.tokenizer().bos_id().has_value()) out.set_bos_token_id(*frontend.tokenizer().bos_id());
  out.set_has_chat_template(!frontend.tokenizer().chat_template().empty());
  const SamplingDefaults& d = model.defaults;
  if (d.temperature.has_value()) out.set_default_temperature(*d.temperature);
  if (d.top_p.has_value()) out.set_default_top_p(*d.top_p);
  if (d.min_p.has_value()) out.set_default_min_p(*d.min_p);
  if (d.top_k.has_value()) out.set_default_top_k(*d.top_k);
  if (d.repetition_penalty.has_value()) out.set_default_repetition_penalty(*d.repetition_penalty);
  return out;
}

}  // namespace soloist
