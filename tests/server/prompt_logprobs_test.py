"""prompt_logprobs over gRPC: transformers' values, those of generation again, scoring alone, bounded messages, refusals."""

import json
import os
import unittest

import grpc

from soloist_client import Client, Server, tokens_of

LENGTH = 2
GOLDENS = os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "parity", "prompt_logprobs.jsonl")
PROMPTS = os.path.join(os.environ["SOLOIST_MODEL"], "golden", "prompts.jsonl")


def lines(path):
    with open(path, encoding="utf-8") as file:
        return [json.loads(line) for line in file]


class PromptLogprobsTest(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.server = Server("--ranks=4", "--cpu-gemm=fma")  # to the last bits, on any CPU
        cls.client = Client(cls.server.address)
        cls.prompts = {case["name"]: case["ids"] for case in lines(PROMPTS)}

    @classmethod
    def tearDownClass(cls):
        cls.client.close()
        cls.server.__exit__()

    def score(self, ids, top=0, max_tokens=0, **fields):
        """All events; and the entries of the prompt, checked to be in order and before any token."""
        sampling = {"max_tokens": max_tokens, **fields.pop("sampling", {})}
        events = list(self.client.generate(token_ids={"ids": ids}, prompt_logprobs=top, sampling=sampling, **fields))
        kinds = [e.WhichOneof("event") for e in events]
        self.assertEqual(kinds[0], "accepted")
        self.assertEqual(kinds[-1], "completed")
        parts = [e.prompt_logprobs for e in events if e.HasField("prompt_logprobs")]
        self.assertEqual(kinds[1:1 + len(parts)], ["prompt_logprobs"] * len(parts))
        entries = []
        for part in parts:
            self.assertEqual(part.first_index, len(entries) + 1)
            entries.extend(part.logprobs)
        self.assertEqual([e.chosen.token_id for e in entries], ids[1:])
        self.assertEqual([len(e.top) for e in entries], [top] * len(entries))
        return events, entries

    def test_equals_transformers(self):
        worst, tokens = 0, 0
        for golden in lines(GOLDENS):
            events, entries = self.score(self.prompts[golden["name"]], top=3)
            self.assertEqual([e.finished.reason for e in events if e.HasField("finished")], [LENGTH])
            self.assertEqual(tokens_of(events), [])
            self.assertEqual(events[-1].completed.usage.output_tokens, 0)
            for entry, logprob in zip(entries, golden["logprobs"], strict=True):
                error = abs(entry.chosen.logprob - logprob)
                self.assertLess(error, 1e-3)
                worst = max(worst, error)
                tokens += 1
            for entry, values in zip(entries, golden.get("top_logprobs", [])):
                for top, value in zip(entry.top, values, strict=True):
                    self.assertAlmostEqual(top.logprob, value, delta=1e-3)
        print(f"{tokens} tokens: errors against transformers {worst:.1e} at most")

    def test_equals_generation(self):
        prompt = self.prompts["once_upon"]
        for seed in range(3):
            events = list(self.client.generate(token_ids={"ids": prompt}, logprobs=2, stop={"ignore_eos": True},
                                               sampling={"max_tokens": 50, "seed": seed, "temperature": 1.2}))
            tokens = tokens_of(events)
            self.assertEqual(len(tokens), 50)
            generated = [lp for e in events if e.HasField("delta") for lp in e.delta.logprobs]
            events, entries = self.score(prompt + tokens, top=2)
            self.assertEqual(events[-1].completed.usage.cached_prompt_tokens, 0)  # though all but the end is there
            self.assertEqual(list(entries[len(prompt) - 1:]), generated)

    def test_then_generates_as_ever(self):
        prompt = self.prompts["story_300"]
        plain = list(self.client.generate(token_ids={"ids": prompt}, sampling={"max_tokens": 20, "temperature": 0}, n=2))
        events, entries = self.score(prompt, top=20, max_tokens=20, n=2, logprobs=0, sampling={"temperature": 0})
        self.assertEqual(len(entries), len(prompt) - 1)
        for index in range(2):
            self.assertEqual(tokens_of(events, index), tokens_of(plain, index))
        for entry in entries:
            self.assertEqual(sorted((t.logprob for t in entry.top), reverse=True), [t.logprob for t in entry.top])
            self.assertLessEqual(entry.chosen.logprob, entry.top[0].logprob)
            self.assertTrue(all(t.token_bytes for t in entry.top))

    def test_long_prompt_in_bounded_messages(self):
        prompt = self.prompts["long_1500"] + self.prompts["story_300"]
        events, entries = self.score(prompt, top=20)
        self.assertEqual(len(entries), len(prompt) - 1)
        sizes = [e.ByteSize() for e in events]
        self.assertLess(max(sizes), 400_000)
        self.assertGreater(len(sizes), 6)
        print(f"{len(prompt)} tokens with 20 each in {len(sizes) - 3} messages of up to {max(sizes)} bytes")

    def test_one_token(self):
        for max_tokens in (0, 3):
            events, entries = self.score([5], max_tokens=max_tokens, stop={"ignore_eos": True})
            self.assertEqual(entries, [])
            self.assertEqual(len(tokens_of(events)), max_tokens)

    def test_text_and_the_whole_context(self):
        events = list(self.client.generate(text="Once upon a time", prompt_logprobs=0, sampling={"max_tokens": 0}))
        entries = [lp for e in events if e.HasField("prompt_logprobs") for lp in e.prompt_logprobs.logprobs]
        self.assertEqual(len(entries), events[0].accepted.prompt_tokens - 1)
        self.assertEqual(b"".join(e.chosen.token_bytes for e in entries), b"Once upon a time")
        limit = self.client.control("GetServerInfo").capacity.max_model_len
        _, entries = self.score([7] * limit)
        self.assertEqual(len(entries), limit - 1)

    def test_refusals(self):
        limit = self.client.control("GetServerInfo").capacity.max_model_len
        cases = [({"prompt_logprobs": 21}, "prompt_logprobs is 21, allowed: 0 to 20"),
                 ({"prompt_logprobs": -1}, "prompt_logprobs is -1, allowed: 0 to 20"),
                 ({"sampling": {"max_tokens": 0}}, f"max_tokens is 0, allowed: 1 to {limit}, and 0 with prompt_logprobs"),
                 ({"prompt_logprobs": 0, "sampling": {"max_tokens": 0, "min_tokens": 1}},
                  "min_tokens is 1, allowed: 0 to 0"),
                 ({"token_ids": {"ids": [7] * (limit + 1)}, "prompt_logprobs": 0, "sampling": {"max_tokens": 0}},
                  f"tokens of the prompt: {limit + 1}, the limit is {limit}")]
        for fields, message in cases:
            with self.assertRaises(grpc.RpcError) as caught:
                list(self.client.generate(**{"token_ids": {"ids": [1, 2]}, **fields}))
            self.assertEqual(caught.exception.code(), grpc.StatusCode.INVALID_ARGUMENT)
            self.assertEqual(caught.exception.details(), message)


if __name__ == "__main__":
    unittest.main(verbosity=2)
