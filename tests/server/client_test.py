"""A client made from server reflection alone: services, health, streaming, cancellation, bad input, drain."""

import json
import time
import unittest

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from soloist_client import Client, Server, client_of, text_of, tokens_of

PROMPT = "Once upon a time"


def idle(load):
    return (load.running_requests == 0 and load.waiting_requests == 0 and load.open_streams == 0
            and all(h.used_blocks == 0 and h.running_sequences == 0 and h.waiting_sequences == 0 for h in load.homes))


class ClientTest(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.server = Server("--ranks=4")
        cls.client = Client(cls.server.address)

    @classmethod
    def tearDownClass(cls):
        cls.client.close()
        cls.server.__exit__()

    def await_idle(self, seconds=20):
        deadline = time.time() + seconds
        while time.time() < deadline:
            load = self.client.control("GetLoad")
            if idle(load):
                return load
            time.sleep(0.01)
        self.fail(f"not idle after {seconds} s: {load}")

    def logged(self, request_id, seconds=10):
        """The log's line of a request, as a dict."""
        deadline = time.time() + seconds
        while time.time() < deadline:
            found = [line.split("request ", 1)[1] for line in list(self.server.lines) if f'{{"request_id":"{request_id}"' in line]
            if found:
                self.assertEqual(len(found), 1)
                return json.loads(found[0])
            time.sleep(0.01)
        self.fail(f"no line of request {request_id}")

    def test_every_request_has_a_line_in_the_log(self):
        trace, parent = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
        events = list(self.client.generate(text=PROMPT, sampling={"temperature": 0, "max_tokens": 12}, request_id="log-1",
                                           metadata=[("traceparent", f"00-{trace}-{parent}-01")]))
        line = self.logged("log-1")
        self.assertEqual((line["trace_id"], line["parent_id"]), (trace, parent))
        self.assertEqual(line["output_tokens"], len(tokens_of(events)))
        self.assertEqual(line["prompt_tokens"], events[0].accepted.prompt_tokens)
        self.assertIn(line["finish"], (["length"], ["stop"]))
        self.assertTrue(0 <= line["queue_ms"] <= line["ttft_ms"] <= line["e2e_ms"], line)
        call = self.client.generate(text=PROMPT, sampling={"max_tokens": 1900}, stop={"ignore_eos": True}, request_id="log-2")
        next(call)
        call.cancel()
        line = self.logged("log-2")
        self.assertNotIn("trace_id", line)
        self.assertIn(line["finish"], (["open"], ["cancelled"]))
        self.await_idle()

    def greedy(self, **fields):
        sampling = {"temperature": 0, "max_tokens": 40, **fields.pop("sampling", {})}
        return list(self.client.generate(text=PROMPT, sampling=sampling, **fields))

    def test_lists_services(self):
        self.assertEqual(self.client.services(),
                         ["grpc.health.v1.Health", "grpc.reflection.v1alpha.ServerReflection",
                          "soloist.v1.ControlService", "soloist.v1.InferenceService"])

    def test_health(self):
        stub = health_pb2_grpc.HealthStub(self.client.channel)
        for service in ["", "soloist.v1.InferenceService", "soloist.v1.ControlService"]:
            self.assertEqual(stub.Check(health_pb2.HealthCheckRequest(service=service)).status,
                             health_pb2.HealthCheckResponse.SERVING)
        report = self.client.control("Health")
        self.assertEqual(report.state, 2)
        self.assertEqual([c.name for c in report.checks], ["engine", "admission", "rank/0", "rank/1", "rank/2", "rank/3"])
        self.assertTrue(all(c.ok for c in report.checks))

    def test_info(self):
        info = self.client.control("GetServerInfo")
        self.assertEqual(info.layout.num_ranks, 4)
        self.assertEqual(sorted(set(info.layout.expert_rank)), [0, 1, 2, 3])
        self.assertEqual(len(info.layout.expert_rank), 16)
        self.assertGreater(info.capacity.kv_blocks, 0)
        model = self.client.control("GetModelInfo")
        self.assertEqual((model.name, model.architecture, model.vocab_size), ("tiny", "MixtralForCausalLM", 4096))

    def test_streams_in_order_with_usage_and_times(self):
        events = self.greedy(logprobs=3, sampling={"seed": 7})
        kinds = [e.WhichOneof("event") for e in events]
        self.assertEqual(kinds[0], "accepted")
        self.assertEqual(kinds[-2:], ["finished", "completed"])
        self.assertEqual(set(kinds[1:-2]), {"delta"})
        self.assertGreater(len(kinds), 10)  # streamed, not in one piece
        tokens = tokens_of(events)
        self.assertEqual(len(tokens), 40)
        self.assertEqual(events[-2].finished.reason, 2)
        usage, timing = events[-1].completed.usage, events[-1].completed.timing
        self.assertEqual((usage.prompt_tokens, usage.output_tokens), (events[0].accepted.prompt_tokens, 40))
        self.assertTrue(0 < timing.arrival_unix_ns <= timing.first_scheduled_unix_ns <= timing.first_token_unix_ns
                        <= timing.last_token_unix_ns)
        self.assertLess(abs(timing.arrival_unix_ns * 1e-9 - time.time()), 60)
        self.assertEqual(timing.total_ns, timing.time_to_first_token_ns + timing.decode_ns)
        logprobs = [lp for e in events if e.HasField("delta") for lp in e.delta.logprobs]
        self.assertEqual(len(logprobs), 40)
        for token, entry in zip(tokens, logprobs):
            self.assertEqual(entry.chosen.token_id, token)
            self.assertEqual(entry.top[0].token_id, token)  # greedy
            self.assertEqual(len(entry.top), 3)
            self.assertTrue(0 >= entry.top[0].logprob >= entry.top[1].logprob >= entry.top[2].logprob)
        # The text is that of the tokens.
        whole = self.client.call("soloist.v1.InferenceService", "Detokenize", token_ids=tokens)
        self.assertEqual(text_of(events), whole.text)

    def test_several_outputs(self):
        fields = {"n": 3, "sampling": {"temperature": 1, "seed": 5}}
        events = self.greedy(**fields)
        outputs = [tokens_of(events, i) for i in range(3)]
        self.assertEqual([len(o) for o in outputs], [40, 40, 40])
        self.assertEqual(len({tuple(o) for o in outputs}), 3)
        self.assertEqual(sum(e.HasField("finished") for e in events), 3)
        self.assertEqual(sum(e.HasField("completed") for e in events), 1)
        self.assertEqual(outputs, [tokens_of(self.greedy(**fields), i) for i in range(3)])

    def test_stop_string_ends_text_before_itself(self):
        whole = text_of(self.greedy())
        words = whole.split(" ")
        stop = " " + words[5] + " " + words[6][:2]  # across tokens
        cut = whole.index(stop)
        events = self.greedy(stop={"strings": ["never to be seen", stop]})
        self.assertEqual(text_of(events), whole[:cut])
        self.assertEqual((events[-2].finished.reason, events[-2].finished.stop_string), (1, stop))
        events = self.greedy(stop={"strings": [stop], "include_in_output": True})
        self.assertEqual(text_of(events), whole[:cut] + stop)
        self.assertEqual(events[-2].finished.output_tokens, len(tokens_of(events)))

    def test_stop_token(self):
        tokens = tokens_of(self.greedy())
        stop = tokens[10]
        first = tokens.index(stop)
        events = self.greedy(stop={"token_ids": [stop]})
        self.assertEqual(tokens_of(events), tokens[:first + 1])
        self.assertEqual((events[-2].finished.reason, events[-2].finished.stop_token_id), (1, stop))
        text = self.client.call("soloist.v1.InferenceService", "Detokenize", token_ids=tokens[:first]).text
        self.assertEqual(text_of(events), text)

    def test_tokenize_and_token_ids_prompt(self):
        reply = self.client.call("soloist.v1.InferenceService", "Tokenize", text=PROMPT, return_token_bytes=True)
        self.assertEqual(len(reply.token_bytes), len(reply.token_ids))
        by_text = self.greedy()
        by_ids = list(self.client.generate(token_ids={"ids": reply.token_ids},
                                           sampling={"temperature": 0, "max_tokens": 40}))
        self.assertEqual(tokens_of(by_text), tokens_of(by_ids))

    def start_long(self, **fields):
        call = self.client.generate(text=PROMPT, sampling={"temperature": 0, "max_tokens": 1900},
                                    stop={"ignore_eos": True}, **fields)
        events = []
        for event in call:
            events.append(event)
            if len(events) > 10:
                return call, events
        return self.fail("ended too early")

    def test_cancel_half_way_frees_everything(self):
        # 16 x 1,900 tokens take seconds; a cancel that starved processes deliver late still comes before their end.
        before = self.client.control("GetLoad").generated_tokens
        call, _ = self.start_long(n=16)
        self.assertGreater(self.client.control("GetLoad").running_requests, 0)
        call.cancel()
        load = self.await_idle()
        self.assertLess(load.generated_tokens - before, 16 * 1900)

    def test_abort(self):
        call, _ = self.start_long(request_id="abort-me")
        self.client.call("soloist.v1.InferenceService", "Abort", request_id="abort-me")
        rest = list(call)
        self.assertEqual(rest[-2].finished.reason, 3)
        self.assertTrue(rest[-1].HasField("completed"))
        self.await_idle()

    def test_deadline(self):
        call = self.client.generate(text=PROMPT, timeout=0.3, stop={"ignore_eos": True},
                                    sampling={"temperature": 0, "max_tokens": 1900})
        with self.assertRaises(grpc.RpcError) as raised:
            list(call)
        self.assertEqual(raised.exception.code(), grpc.StatusCode.DEADLINE_EXCEEDED)
        self.await_idle()

    def test_lost_connection(self):
        other = Client(self.server.address)
        call = other.generate(text=PROMPT, sampling={"temperature": 0, "max_tokens": 1900}, stop={"ignore_eos": True})
        next(call)
        other.close()
        self.await_idle()

    def test_bad_input(self):
        invalid, big = grpc.StatusCode.INVALID_ARGUMENT, "x" * 100
        long_ids = {"ids": [1] * 3000}
        cases = [  # request fields, code, what the message must name
            ({}, invalid, ["prompt"]),
            ({"token_ids": {"ids": []}}, invalid, ["prompt", "empty"]),
            ({"token_ids": {"ids": [1, 4096]}}, invalid, ["[1]", "4096", "4095"]),
            ({"token_ids": {"ids": [-1]}}, invalid, ["-1"]),
            ({"token_ids": long_ids}, invalid, ["3000", "2047"]),
            ({"text": big, "n": 0}, invalid, ["n is 0", "1 to 16"]),
            ({"text": big, "n": 17}, invalid, ["n is 17", "16"]),
            ({"text": big, "logprobs": 21}, invalid, ["logprobs is 21", "20"]),
            ({"text": big, "sampling": {"temperature": -1}}, invalid, ["temperature is -1"]),
            ({"text": big, "sampling": {"temperature": float("nan")}}, invalid, ["temperature is nan"]),
            ({"text": big, "sampling": {"top_p": 0}}, invalid, ["top_p is 0"]),
            ({"text": big, "sampling": {"top_p": 1.5}}, invalid, ["top_p is 1.5"]),
            ({"text": big, "sampling": {"min_p": 2}}, invalid, ["min_p is 2"]),
            ({"text": big, "sampling": {"top_k": -5}}, invalid, ["top_k is -5"]),
            ({"text": big, "sampling": {"repetition_penalty": 0}}, invalid, ["repetition_penalty is 0"]),
            ({"text": big, "sampling": {"presence_penalty": 3}}, invalid, ["presence_penalty is 3", "-2", "2"]),
            ({"text": big, "sampling": {"frequency_penalty": -3}}, invalid, ["frequency_penalty is -3"]),
            ({"text": big, "sampling": {"max_tokens": 0}}, invalid, ["max_tokens is 0"]),
            ({"text": big, "sampling": {"max_tokens": 2048}}, invalid, ["max_tokens", "2048"]),
            ({"text": big, "sampling": {"max_tokens": 5, "min_tokens": 6}}, invalid, ["min_tokens is 6", "5"]),
            ({"text": big, "sampling": {"logit_bias": [{"token_id": 9999, "bias": 1}]}}, invalid, ["9999"]),
            ({"text": big, "sampling": {"logit_bias": [{"token_id": 9, "bias": float("inf")}]}}, invalid, ["inf"]),
            ({"text": big, "stop": {"strings": ["a"] * 17}}, invalid, ["17", "16"]),
            ({"text": big, "stop": {"strings": [""]}}, invalid, ["stop string 0 is empty"]),
            ({"text": big, "stop": {"strings": ["a" * 257]}}, invalid, ["257", "256"]),
            ({"text": big, "stop": {"token_ids": [5000]}}, invalid, ["5000"]),
            ({"text": big, "request_id": "two words"}, invalid, ["request_id"]),
            ({"text": big, "request_id": "i" * 129}, invalid, ["129", "128"]),
            ({"text": big, "cache_salt": "s" * 257}, invalid, ["257", "256"]),
            ({"text": big, "return_logits": True}, invalid, ["return_logits"]),
            ({"text": "word " * (1 << 20)}, invalid, ["5242880", "4194304"]),
            ({"text": "x" * (9 << 20)}, grpc.StatusCode.RESOURCE_EXHAUSTED, ["9437", "8388608"]),
            ({"text": "many words " * 3000}, invalid, ["2047"]),
        ]
        for fields, code, named in cases:
            label = str(fields)[:80]
            with self.subTest(label):
                with self.assertRaises(grpc.RpcError) as raised:
                    list(self.client.generate(**fields))
                self.assertEqual(raised.exception.code(), code, label)
                for word in named:
                    self.assertIn(word, raised.exception.details(), label)
        self.assertGreaterEqual(len(cases), 20)
        self.await_idle()

    def test_bad_calls(self):
        call, _ = self.start_long(request_id="twice")
        with self.assertRaises(grpc.RpcError) as raised:
            list(self.client.generate(text=PROMPT, request_id="twice"))
        self.assertEqual(raised.exception.code(), grpc.StatusCode.ALREADY_EXISTS)
        self.assertIn("twice", raised.exception.details())
        call.cancel()
        with self.assertRaises(grpc.RpcError) as raised:
            self.client.call("soloist.v1.InferenceService", "Abort", request_id="nobody")
        self.assertEqual(raised.exception.code(), grpc.StatusCode.NOT_FOUND)
        with self.assertRaises(grpc.RpcError) as raised:
            self.client.call("soloist.v1.InferenceService", "Detokenize", token_ids=[4, 99999])
        self.assertEqual(raised.exception.code(), grpc.StatusCode.INVALID_ARGUMENT)
        self.assertIn("99999", raised.exception.details())
        # Bytes that are no message.
        raw = self.client.channel.unary_stream("/soloist.v1.InferenceService/Generate")
        with self.assertRaises(grpc.RpcError):
            list(raw(b"\xff\xff\xff\xff"))
        with self.assertRaises(grpc.RpcError) as raised:
            self.client.channel.unary_unary("/soloist.v1.InferenceService/Nothing")(b"")
        self.assertEqual(raised.exception.code(), grpc.StatusCode.UNIMPLEMENTED)
        self.await_idle()


class LifeTest(unittest.TestCase):
    def test_keepalive_pings_and_long_idle(self):
        options = [("grpc.keepalive_time_ms", 10_000), ("grpc.keepalive_permit_without_calls", 1),
                   ("grpc.http2.max_pings_without_data", 0)]
        with Server("--ranks=1") as server, client_of(server, options=options) as client:
            time.sleep(25)
            self.assertEqual(client.control("Health").state, 2)

    def test_queue_limit(self):
        with Server("--ranks=1", "--max-sequences=1", "--max-queue=2") as server, client_of(server) as client:
            long = {"text": PROMPT, "sampling": {"max_tokens": 1900}, "stop": {"ignore_eos": True}}
            calls = [client.generate(**long)]
            next(calls[0])
            while client.control("GetLoad").running_requests == 0:
                time.sleep(0.01)
            for _ in range(2):
                calls.append(client.generate(**long))
                next(calls[-1])
            with self.assertRaises(grpc.RpcError) as raised:
                list(client.generate(**long))
            self.assertEqual(raised.exception.code(), grpc.StatusCode.RESOURCE_EXHAUSTED)
            self.assertIn("2", raised.exception.details())
            for call in calls:
                call.cancel()

    def test_slow_reader_is_cancelled_with_bounded_memory(self):
        with Server("--ranks=1", "--max-buffered-tokens=64", "--allow-logits") as server:
            with client_of(server) as client:
                # 2 x 1900 x 16 KB: more than the connection's window and the socket hold.
                call = client.generate(text=PROMPT, n=2, return_logits=True, stop={"ignore_eos": True},
                                       sampling={"max_tokens": 1900})
                next(call)
                deadline = time.time() + 60
                with client_of(server) as other:
                    load = other.control("GetLoad")
                    while (load.generated_tokens == 0 or not idle_homes(load)) and time.time() < deadline:
                        time.sleep(0.05)
                        load = other.control("GetLoad")
                    self.assertLess(load.generated_tokens, 3800)  # it did not run to its end
                    self.assertTrue(idle_homes(other.control("GetLoad")))
                finished = [e.finished for e in call if e.HasField("finished")]
                self.assertEqual({f.reason for f in finished}, {4})
                self.assertEqual({f.error.code for f in finished}, {8})
                self.assertIn("too slow", finished[0].error.message)
                self.assertTrue(finished[0].error.retryable)

    def test_drain_finishes_what_runs(self):
        with Server("--ranks=2") as server, client_of(server) as client:
            call = client.generate(text=PROMPT, sampling={"max_tokens": 600, "temperature": 0},
                                   stop={"ignore_eos": True})
            next(call)
            client.control("Drain")
            self.assertEqual(client.control("Health").state, 4)
            with self.assertRaises(grpc.RpcError) as raised:
                list(client.generate(text=PROMPT))
            self.assertEqual(raised.exception.code(), grpc.StatusCode.UNAVAILABLE)
            self.assertIn("draining", raised.exception.details())
            time.sleep(0.3)
            stub = health_pb2_grpc.HealthStub(client.channel)
            self.assertEqual(stub.Check(health_pb2.HealthCheckRequest()).status,
                             health_pb2.HealthCheckResponse.NOT_SERVING)
            self.assertEqual(len(tokens_of(list(call))), 600)

    def test_sigterm_drains(self):
        with Server("--ranks=2") as server, client_of(server) as client:
            call = client.generate(text=PROMPT, sampling={"max_tokens": 600, "temperature": 0},
                                   stop={"ignore_eos": True})
            next(call)
            server.process.terminate()
            self.assertEqual(len(tokens_of(list(call))), 600)
            self.assertEqual(server.process.wait(30), 0)

    def test_second_sigterm_stops(self):
        with Server("--ranks=2") as server, client_of(server) as client:
            call = client.generate(text=PROMPT, sampling={"max_tokens": 1900}, stop={"ignore_eos": True})
            next(call)
            server.process.terminate()
            time.sleep(0.2)
            self.assertIsNone(server.process.poll())
            server.process.terminate()
            self.assertEqual(server.process.wait(20), 0)
            with self.assertRaises(grpc.RpcError):
                list(call)

    def test_drain_timeout(self):
        with Server("--ranks=2", "--drain-timeout=0.2") as server, client_of(server) as client:
            call = client.generate(text=PROMPT, sampling={"max_tokens": 1900}, stop={"ignore_eos": True})
            next(call)
            self.assertEqual(server.terminate(20), 0)
            with self.assertRaises(grpc.RpcError):
                list(call)

    def test_starting_answers_health(self):
        with Server("--ranks=1", wait_ready=False) as server, client_of(server) as client:
            first = client.control("Health").state  # STARTING or, if loading was quick, READY
            self.assertIn(first, (1, 2))
            server.ready.wait(60)
            self.assertEqual(client.control("Health").state, 2)

    def test_port_in_use(self):
        with Server("--ranks=1") as server:
            with self.assertRaisesRegex(RuntimeError, "cannot listen at"):
                Server("--ranks=1", address=server.address)


def idle_homes(load):
    return load.running_requests == 0 and all(h.used_blocks == 0 for h in load.homes)


if __name__ == "__main__":
    unittest.main(verbosity=2)
