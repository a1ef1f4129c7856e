"""The HTTP API of the real binary with the bundled model: what is answered, and that it is what gRPC answers."""

import json
import struct
import threading
import time
import unittest

import openai

from http_client import Connection, ask, ask_json, events_of, is_error, request_bytes
from soloist_client import Client, Server, text_of, tokens_of

PROMPT = "Once upon a time"
REASONS = {1: "stop", 2: "length"}


def f32(number):
    return struct.unpack("f", struct.pack("f", number))[0]


class ApiTest(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.server = Server("--ranks=4", "--http-address=127.0.0.1:0", "--http-allow-origin=https://pages.example")
        cls.client = Client(cls.server.address)
        cls.http = cls.server.http_address

    @classmethod
    def tearDownClass(cls):
        cls.client.close()
        cls.server.__exit__()

    def post(self, path, body, headers=()):
        status, answer = ask_json(self.http, "POST", path, body, headers)
        self.assertEqual(status, 200, answer)
        return answer

    def stream(self, path, body):
        status, headers, data = ask(self.http, "POST", path, {**body, "stream": True})
        self.assertEqual((status, headers["content-type"]), (200, "text/event-stream; charset=utf-8"), data)
        return events_of(data)

    # ---- The same requests over gRPC and HTTP

    def grpc_outputs(self, n=1, **fields):
        """Per output: text, tokens, logprobs [(id, logprob, [(id, logprob)])], reason; and the usage."""
        events = list(self.client.generate(n=n, **fields))
        outputs = []
        for i in range(n):
            logprobs = [(lp.chosen.token_id, lp.chosen.logprob, [(t.token_id, t.logprob) for t in lp.top])
                        for e in events if e.HasField("delta") and e.delta.output_index == i for lp in e.delta.logprobs]
            reason = next(e.finished.reason for e in events if e.HasField("finished") and e.finished.output_index == i)
            outputs.append((text_of(events, i), tokens_of(events, i), logprobs, REASONS[reason]))
        usage = events[-1].completed.usage
        return outputs, (usage.prompt_tokens, usage.output_tokens)

    def http_outputs(self, body, stream):
        """The same from a completion."""
        body = {**body, "return_token_ids": True, "return_tokens_as_token_ids": True, "add_special_tokens": True}
        n = body.get("n", 1)
        if stream:
            events = self.stream("/v1/completions", {**body, "stream_options": {"include_usage": True}})
            usage = events[-1]["usage"]
            self.assertEqual(events[-1]["choices"], [])
            choices = [{"text": "", "token_ids": [], "logprobs": None} for _ in range(n)]
            for event in events[:-1]:
                self.assertIsNone(event["usage"])
                (piece,) = event["choices"]
                choice = choices[piece["index"]]
                self.assertNotIn("finish_reason", choice, "something came after the end")
                choice["text"] += piece["text"]
                choice["token_ids"] += piece.get("token_ids", [])
                if piece["logprobs"]:
                    if choice["logprobs"] is None:
                        choice["logprobs"] = {name: [] for name in piece["logprobs"]}
                    for name, values in piece["logprobs"].items():
                        choice["logprobs"][name] += values
                if piece["finish_reason"]:
                    choice["finish_reason"] = piece["finish_reason"]
        else:
            answer = self.post("/v1/completions", body)
            usage, choices = answer["usage"], answer["choices"]
            self.assertEqual([c["index"] for c in choices], list(range(n)))
        outputs = []
        for choice in choices:
            logprobs = []
            if choice["logprobs"]:
                lp = choice["logprobs"]
                self.assertEqual({len(v) for v in lp.values()}, {len(choice["token_ids"])})
                number = lambda name: int(name.removeprefix("token_id:"))  # noqa: E731
                logprobs = [(number(t), f32(p), [(number(k), f32(v)) for k, v in top.items()])
                            for t, p, top in zip(lp["tokens"], lp["token_logprobs"], lp["top_logprobs"])]
            outputs.append((choice["text"], choice["token_ids"], logprobs, choice["finish_reason"]))
        return outputs, (usage["prompt_tokens"], usage["completion_tokens"])

    def test_completions_are_those_of_grpc(self):
        ids = list(self.client.call("soloist.v1.InferenceService", "Tokenize", text=PROMPT).token_ids)
        word = self.grpc_outputs(text=PROMPT, sampling={"temperature": 0, "max_tokens": 12})[0][0]
        cases = [  # gRPC's fields, HTTP's
            ({"text": PROMPT, "sampling": {"temperature": 0, "max_tokens": 24}},
             {"prompt": PROMPT, "temperature": 0, "max_tokens": 24}),
            ({"token_ids": {"ids": ids}, "sampling": {"seed": 7, "max_tokens": 16}, "n": 3},
             {"prompt": ids, "seed": 7, "max_tokens": 16, "n": 3, "best_of": 3}),
            ({"text": PROMPT, "logprobs": 4, "sampling": {"temperature": 0.7, "seed": 1, "max_tokens": 10}},
             {"prompt": PROMPT, "logprobs": 4, "temperature": 0.7, "seed": 1, "max_tokens": 10}),
            ({"text": PROMPT, "logprobs": 0, "sampling": {"temperature": 0, "max_tokens": 5}},
             {"prompt": PROMPT, "logprobs": 0, "temperature": 0, "max_tokens": 5}),
            ({"text": PROMPT, "sampling": {"temperature": 0, "max_tokens": 30}, "stop": {"strings": [word[0][-4:]]}},
             {"prompt": PROMPT, "temperature": 0, "max_tokens": 30, "stop": word[0][-4:]}),
            ({"text": PROMPT, "sampling": {"temperature": 0, "max_tokens": 30},
              "stop": {"token_ids": [word[1][6]], "include_in_output": True}},
             {"prompt": PROMPT, "temperature": 0, "max_tokens": 30, "stop_token_ids": [word[1][6]],
              "include_stop_str_in_output": True}),
            ({"text": PROMPT, "stop": {"ignore_eos": True},
              "sampling": {"temperature": 1.2, "top_k": 20, "top_p": 0.9, "min_p": 0.01, "repetition_penalty": 1.1,
                           "presence_penalty": 0.3, "frequency_penalty": 0.2, "seed": 2**63 + 5, "max_tokens": 20,
                           "min_tokens": 3, "logit_bias": [{"token_id": 5, "bias": -4}, {"token_id": 9, "bias": 2}]}},
             {"prompt": PROMPT, "ignore_eos": True, "temperature": 1.2, "top_k": 20, "top_p": 0.9, "min_p": 0.01,
              "repetition_penalty": 1.1, "presence_penalty": 0.3, "frequency_penalty": 0.2, "seed": 2**63 + 5,
              "max_tokens": 20, "min_tokens": 3, "logit_bias": {"5": -4, "9": 2}}),
            ({"text": PROMPT, "response_format": {"regex": "[a-f]{4,12}"}, "sampling": {"seed": 3, "max_tokens": 20}},
             {"prompt": PROMPT, "guided_regex": "[a-f]{4,12}", "seed": 3, "max_tokens": 20}),
            ({"text": PROMPT, "response_format": {"choice": {"texts": ["red", "blue"]}},
              "sampling": {"seed": 3, "max_tokens": 20}},
             {"prompt": PROMPT, "structured_outputs": {"choice": ["red", "blue"]}, "seed": 3, "max_tokens": 20}),
        ]
        for grpc_fields, http_fields in cases:
            for stream in (False, True):
                with self.subTest(http_fields, stream=stream):
                    expected, usage = self.grpc_outputs(**grpc_fields)
                    got, http_usage = self.http_outputs(http_fields, stream)
                    if http_fields.get("logprobs") == 0:  # OpenAI's shape always has the chosen token among the top
                        expected = [(text, tokens, [(i, p, [(i, p)]) for i, p, _ in lps], why)
                                    for text, tokens, lps, why in expected]
                    elif "logprobs" in http_fields:
                        expected = [(text, tokens, [(i, p, top if i in dict(top) else [*top, (i, p)])
                                                    for i, p, top in lps], why) for text, tokens, lps, why in expected]
                    self.assertEqual(got, expected)
                    self.assertEqual(http_usage, usage)

    def test_several_prompts(self):
        prompts = [PROMPT, "The dragon said", "One day"]
        alone = [self.http_outputs({"prompt": p, "seed": 3, "n": 2, "max_tokens": 8}, False) for p in prompts]
        answer = self.post("/v1/completions", {"prompt": prompts, "seed": 3, "n": 2, "max_tokens": 8,
                                               "return_token_ids": True})
        self.assertEqual([c["text"] for c in answer["choices"]], [o[0] for outputs, _ in alone for o in outputs])
        self.assertEqual(answer["usage"]["prompt_tokens"], sum(usage[0] for _, usage in alone))
        self.assertEqual(answer["usage"]["completion_tokens"], 6 * 8)
        ids = [self.post("/tokenize", {"prompt": p})["tokens"] for p in prompts]
        by_ids = self.post("/v1/completions", {"prompt": ids, "seed": 3, "n": 2, "max_tokens": 8})
        self.assertEqual([c["text"] for c in by_ids["choices"]], [c["text"] for c in answer["choices"]])
        events = self.stream("/v1/completions", {"prompt": prompts, "seed": 3, "n": 2, "max_tokens": 8})
        for choice in answer["choices"]:
            self.assertEqual("".join(c["text"] for e in events for c in e["choices"] if c["index"] == choice["index"]),
                             choice["text"])

    def test_echo(self):
        plain = self.post("/v1/completions", {"prompt": PROMPT, "temperature": 0})["choices"][0]["text"]
        for body in ({"prompt": PROMPT}, {"prompt": self.post("/tokenize", {"prompt": PROMPT})["tokens"]}):
            body = {**body, "temperature": 0, "echo": True}
            self.assertEqual(self.post("/v1/completions", body)["choices"][0]["text"], PROMPT + plain)
            events = self.stream("/v1/completions", body)
            self.assertEqual("".join(e["choices"][0]["text"] for e in events), PROMPT + plain)

    def test_echo_with_logprobs(self):
        ask = {"prompt": PROMPT, "temperature": 0, "logprobs": 3, "max_tokens": 12, "return_token_ids": True}
        plain = self.post("/v1/completions", ask)["choices"][0]
        echoed = self.post("/v1/completions", {**ask, "echo": True})["choices"][0]
        ids = self.post("/tokenize", {"prompt": PROMPT})["tokens"]
        lp = echoed["logprobs"]
        for name, values in lp.items():
            self.assertEqual(len(values), len(ids) + 12, name)
            self.assertEqual(values[len(ids):], plain["logprobs"][name] if name != "text_offset" else
                             [offset + len(PROMPT) for offset in plain["logprobs"][name]])
        self.assertEqual((lp["token_logprobs"][0], lp["top_logprobs"][0]), (None, None))
        self.assertEqual(echoed["text"], PROMPT + plain["text"])
        for token, score, top, offset in list(zip(*lp.values()))[1:]:
            self.assertEqual(echoed["text"][offset:offset + len(token)], token)
            self.assertEqual(top[token], score)
            self.assertIn(len(top), (3, 4))  # the token itself may be a fourth
        # What was generated, as a prompt: the same log-probabilities. Without an answer, streamed, and for several outputs.
        whole = {**ask, "prompt": ids + plain["token_ids"], "echo": True, "max_tokens": 0}
        scored = self.post("/v1/completions", whole)
        self.assertEqual(scored["choices"][0]["text"], echoed["text"])
        self.assertEqual(scored["choices"][0]["logprobs"], lp)
        self.assertEqual(scored["usage"]["completion_tokens"], 0)
        pieces = [c for e in self.stream("/v1/completions", whole) for c in e["choices"]]
        self.assertEqual([c["logprobs"] for c in pieces if c["logprobs"]], [lp])
        two = self.post("/v1/completions", {**ask, "prompt": [ids, ids + plain["token_ids"]], "echo": True,
                                            "max_tokens": 1, "n": 2})["choices"]
        for choice, length in zip(two, (1, 1, 13, 13)):
            self.assertEqual(choice["logprobs"]["token_logprobs"][:len(ids) + length - 1],
                             lp["token_logprobs"][:len(ids) + length - 1])
        alone = self.post("/v1/completions", {"prompt": PROMPT, "echo": True, "max_tokens": 0})["choices"][0]
        self.assertEqual((alone["text"], alone["logprobs"], alone["finish_reason"]), (PROMPT, None, "length"))

    def test_continuous_usage(self):
        events = self.stream("/v1/completions", {"prompt": PROMPT, "max_tokens": 10, "return_token_ids": True,
                                                 "ignore_eos": True,
                                                 "stream_options": {"include_usage": True, "continuous_usage_stats": True}})
        seen = 0
        for event in events[:-1]:
            seen += len(event["choices"][0].get("token_ids", []))
            self.assertEqual(event["usage"]["completion_tokens"], seen)
            self.assertEqual(event["usage"]["total_tokens"], seen + event["usage"]["prompt_tokens"])
        self.assertEqual((seen, events[-1]["usage"]["completion_tokens"]), (10, 10))

    def test_text_offsets(self):
        choice = self.post("/v1/completions", {"prompt": PROMPT, "temperature": 0, "logprobs": 1})["choices"][0]
        lp = choice["logprobs"]
        for token, offset in zip(lp["tokens"], lp["text_offset"]):
            self.assertEqual(choice["text"][offset:offset + len(token)], token)

    # ---- OpenAI's own client

    def test_openai_client(self):
        client = openai.OpenAI(base_url=f"http://{self.http}/v1", api_key="unused", max_retries=0)
        self.addCleanup(client.close)
        (model,) = client.models.list().data
        self.assertEqual(client.models.retrieve(model.id).id, "tiny")
        whole = client.completions.create(model="tiny", prompt=PROMPT, max_tokens=20, temperature=0, logprobs=2)
        self.assertEqual(len(whole.choices[0].logprobs.tokens), 20)
        pieces = list(client.completions.create(model="tiny", prompt=PROMPT, max_tokens=20, temperature=0, stream=True,
                                                stream_options={"include_usage": True}))
        self.assertEqual("".join(p.choices[0].text for p in pieces[:-1]), whole.choices[0].text)
        self.assertEqual(pieces[-1].usage.completion_tokens, 20)
        with self.assertRaises(openai.NotFoundError):
            client.completions.create(model="other", prompt=PROMPT)
        with self.assertRaises(openai.BadRequestError) as raised:
            client.completions.create(model="tiny", prompt=PROMPT, suffix="end")
        self.assertEqual(raised.exception.param, "suffix")
        with self.assertRaises(openai.NotFoundError):
            client.responses.create(model="tiny", input="hello")
        with client.completions.create(model="tiny", prompt=PROMPT, max_tokens=1800, stream=True,
                                       extra_body={"ignore_eos": True}) as stream:
            next(iter(stream))
        self.await_idle()

    def await_idle(self):
        deadline = time.time() + 20
        while time.time() < deadline:
            load = self.client.control("GetLoad")
            if load.running_requests == 0 and load.open_streams == 0:
                return
            time.sleep(0.01)
        self.fail(f"not idle: {load}")

    # ---- What else is served

    def test_models(self):
        status, answer = ask_json(self.http, "GET", "/v1/models")
        self.assertEqual((status, answer["object"], answer["data"][0]["id"]), (200, "list", "tiny"))
        self.assertEqual(answer["data"][0]["max_model_len"], 2048)
        self.assertEqual(ask_json(self.http, "GET", "/v1/models/tiny")[1], answer["data"][0])
        self.assertEqual(ask_json(self.http, "GET", "/v1/models/%74iny")[1]["id"], "tiny")
        status, answer = ask_json(self.http, "GET", "/v1/models/other")
        self.assertEqual((status, answer["error"]["code"]), (404, "model_not_found"))

    def test_tokens(self):
        text = "The dragon said: \u00e9\u4f60 \U0001f409"
        expected = self.client.call("soloist.v1.InferenceService", "Tokenize", text=text)
        answer = self.post("/tokenize", {"prompt": text, "return_token_strs": True})
        self.assertEqual(answer["tokens"], list(expected.token_ids))
        self.assertEqual((answer["count"], len(answer["token_strs"])), (len(expected.token_ids),) * 2)
        self.assertEqual(answer["max_model_len"], 2048)
        plain = self.post("/tokenize", {"prompt": text, "add_special_tokens": False})
        self.assertIsNone(plain["token_strs"])
        self.assertEqual(self.post("/detokenize", {"tokens": plain["tokens"]})["prompt"], text)

    def test_operators_questions(self):
        self.assertEqual(ask_json(self.http, "GET", "/health"), (200, {"status": "ready"}))
        self.assertEqual(ask_json(self.http, "GET", "/version")[0], 200)
        load = ask_json(self.http, "GET", "/load")[1]
        self.assertEqual((load["num_ranks"], load["state"]), (4, "ready"))
        self.post("/v1/completions", {"prompt": PROMPT})
        status, headers, text = ask(self.http, "GET", "/metrics")
        self.assertEqual((status, headers["content-type"].split(";")[0]), (200, "text/plain"))
        self.assertRegex(text.decode(), r'\nsoloist:generation_tokens_total\{model_name="tiny"\} [1-9]')

    def test_methods_and_paths(self):
        status, headers, _ = ask(self.http, "HEAD", "/v1/models")
        self.assertEqual((status, int(headers["content-length"])), (200, len(ask(self.http, "GET", "/v1/models")[2])))
        for method, path, allow in [("POST", "/health", "GET, HEAD"), ("GET", "/v1/completions", "POST"),
                                    ("TRACE", "/metrics", "GET, HEAD"), ("OPTIONS", "/tokenize", "POST"),
                                    ("BREW", "/v1/models", "GET, HEAD")]:
            status, headers, body = ask(self.http, method, path)
            self.assertEqual((status, headers["allow"]), (405, allow), (method, path))
            self.assertTrue(is_error(body))
        for path in ("/nothing", "/v1", "/v1/models/", "/v1/completions/"):
            status, _, body = ask(self.http, "GET", path)
            self.assertTrue(status == 404 and is_error(body), path)
        self.assertEqual(ask(self.http, "GET", "/health?probe=1")[0], 200)

    def test_cross_origin(self):
        ask_for = [("Access-Control-Request-Method", "POST")]
        status, headers, _ = ask(self.http, "OPTIONS", "/v1/completions",
                                 headers=[("Origin", "https://pages.example"), *ask_for])
        self.assertEqual((status, headers["access-control-allow-origin"], headers["access-control-allow-methods"]),
                         (204, "https://pages.example", "POST"))
        status, headers, _ = ask(self.http, "OPTIONS", "/v1/completions", headers=[("Origin", "https://other"), *ask_for])
        self.assertEqual((status, "access-control-allow-origin" in headers), (405, False))
        headers = ask(self.http, "GET", "/health", headers=[("Origin", "https://pages.example")])[1]
        self.assertEqual(headers["access-control-allow-origin"], "https://pages.example")

    def test_request_ids_and_traces(self):
        trace = "0af7651916cd43dd8448eb211c80319c"
        status, headers, body = ask(self.http, "POST", "/v1/completions", {"prompt": PROMPT},
                                    [("X-Request-Id", "abc-1"), ("traceparent", f"00-{trace}-b7ad6b7169203331-01"),
                                     ("Authorization", "Bearer nobody")])
        self.assertEqual((status, headers["x-request-id"]), (200, "abc-1"))
        answer_id = json.loads(body)["id"]
        self.assertTrue(answer_id.startswith("cmpl-abc-1-"), answer_id)
        deadline = time.time() + 10
        while not any(answer_id in line and trace in line for line in self.server.lines):
            self.assertLess(time.time(), deadline, "no line in the log")
            time.sleep(0.01)

    def test_unknown_fields_are_logged_once(self):
        for _ in range(2):
            self.post("/v1/completions", {"prompt": PROMPT, "max_tokens": 1, "no_such_field": 1})
        lines = [line for line in self.server.lines if "no_such_field" in line]
        self.assertEqual(len(lines), 1)

    # ---- Chats

    MESSAGES = [{"role": "system", "content": "You tell stories."}, {"role": "user", "content": "A dragon, please."}]

    def test_chat_is_a_completion_of_its_prompt(self):
        ids = self.post("/tokenize", {"messages": self.MESSAGES})["tokens"]
        expected, usage = self.grpc_outputs(token_ids={"ids": ids}, n=2, logprobs=3,
                                            sampling={"temperature": 0.8, "seed": 4, "max_tokens": 12})
        body = {"messages": self.MESSAGES, "temperature": 0.8, "seed": 4, "max_completion_tokens": 12, "n": 2,
                "logprobs": True, "top_logprobs": 3, "return_token_ids": True, "return_tokens_as_token_ids": True}
        answer = self.post("/v1/chat/completions", body)
        self.assertEqual((answer["usage"]["prompt_tokens"], answer["usage"]["completion_tokens"]), usage)
        for choice, (text, tokens, logprobs, reason) in zip(answer["choices"], expected):
            self.assertEqual((choice["message"]["role"], choice["message"]["content"]), ("assistant", text))
            self.assertEqual((choice["token_ids"], choice["finish_reason"]), (tokens, reason))
            for entry, (token, logprob, top) in zip(choice["logprobs"]["content"], logprobs, strict=True):
                self.assertEqual((entry["token"], f32(entry["logprob"])), (f"token_id:{token}", logprob))
                self.assertEqual([(t["token"], f32(t["logprob"])) for t in entry["top_logprobs"]],
                                 [(f"token_id:{t}", p) for t, p in top])
            said = b"".join(bytes(entry["bytes"]) for entry in choice["logprobs"]["content"])
            self.assertTrue(said.decode().startswith(text), (said, text))  # an end token is not in the text
        events = self.stream("/v1/chat/completions", body)
        for choice in answer["choices"]:
            pieces = [c for e in events for c in e["choices"] if c["index"] == choice["index"]]
            self.assertEqual(["role" in p["delta"] for p in pieces], [True] + [False] * (len(pieces) - 1))
            self.assertEqual("".join(p["delta"].get("content", "") for p in pieces), choice["message"]["content"])
            self.assertEqual([lp for p in pieces if p["logprobs"] for lp in p["logprobs"]["content"]],
                             choice["logprobs"]["content"])
            self.assertEqual([p["finish_reason"] for p in pieces], [None] * (len(pieces) - 1) + [choice["finish_reason"]])
        # Text parts are text.
        parts = [{**m, "content": [{"type": "text", "text": m["content"]}]} for m in self.MESSAGES]
        self.assertEqual(self.post("/tokenize", {"messages": parts})["tokens"], ids)

    def test_openai_client_chats(self):
        client = openai.OpenAI(base_url=f"http://{self.http}/v1", api_key="unused", max_retries=0)
        self.addCleanup(client.close)
        whole = client.chat.completions.create(model="tiny", messages=self.MESSAGES, max_completion_tokens=16,
                                               temperature=0, logprobs=True, top_logprobs=2)
        self.assertEqual(len(whole.choices[0].logprobs.content), whole.usage.completion_tokens)
        chunks = list(client.chat.completions.create(model="tiny", messages=self.MESSAGES, max_completion_tokens=16,
                                                     temperature=0, stream=True))
        self.assertEqual(chunks[0].choices[0].delta.role, "assistant")
        self.assertEqual("".join(c.choices[0].delta.content or "" for c in chunks), whole.choices[0].message.content)
        schema = {"type": "object", "properties": {"age": {"type": "integer", "minimum": 0, "maximum": 99}},
                  "required": ["age"], "additionalProperties": False}
        answer = client.chat.completions.create(
            model="tiny", messages=self.MESSAGES, max_tokens=60, seed=1,
            response_format={"type": "json_schema", "json_schema": {"name": "age", "schema": schema}})
        self.assertEqual(list(json.loads(answer.choices[0].message.content)), ["age"])
        for refused in ({"tools": [{"type": "function", "function": {"name": "f"}}]}, {"reasoning_effort": "high"}):
            with self.assertRaises(openai.BadRequestError) as raised:
                client.chat.completions.create(model="tiny", messages=self.MESSAGES, **refused)
            self.assertEqual(raised.exception.param, next(iter(refused)))

    def test_many_at_once(self):
        body = {"prompt": PROMPT, "temperature": 0, "max_tokens": 30}
        expected = self.post("/v1/completions", body)["choices"][0]["text"]
        results = []

        def run():
            with Connection(self.http) as connection:
                for _ in range(3):
                    connection.send(request_bytes("POST", "/v1/completions", {**body, "stream": True}))
                    events = events_of(connection.answer()[2])
                    results.append("".join(e["choices"][0]["text"] for e in events))

        threads = [threading.Thread(target=run) for _ in range(32)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        self.assertEqual(results, [expected] * 96)


if __name__ == "__main__":
    unittest.main(verbosity=2)
