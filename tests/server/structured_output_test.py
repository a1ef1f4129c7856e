"""Structured output of the bundled model at temperature 1: what it generates under 20 JSON schemas parses and validates;
regular expressions, choices, grammars; how outputs end; what is refused. `--generations=500 --figures` is the long run of
docs/measurements, with the cost per token."""

import argparse
import json
import re
import statistics
import sys
import time
import unittest

import grpc
import jsonschema

from soloist_client import Client, Server, text_of, tokens_of

PROMPT = "Once upon a time"
OUTPUTS = 5  # of a request
STOP, LENGTH, ERROR = 1, 2, 4
WORD = {"type": "string", "pattern": "^[a-z]{1,8}$"}


def record(additional=False, required=None, **properties):
    return {"type": "object", "properties": properties, "additionalProperties": additional,
            "required": list(properties) if required is None else required}


def array(items, low, high):
    return {"type": "array", "items": items, "minItems": low, "maxItems": high}


SCHEMAS = [
    record(name={"type": "string", "maxLength": 20}, age={"type": "integer", "minimum": 0, "maximum": 120}),
    record(color={"enum": ["red", "green", "blue"]}, size={"enum": [1, 2, 3, None]}, ok={"type": "boolean"}),
    record(tags=array(WORD, 1, 4), scores=array({"type": "number", "minimum": 0, "maximum": 10}, 2, 2)),
    record(owner=record(first=WORD, last=WORD), pet=record(kind={"enum": ["cat", "dog"]}, name=WORD)),
    record(a=record(b=record(c=record(d={"type": "integer", "minimum": -5, "maximum": 5})))),
    array(record(id={"type": "integer", "minimum": 1, "maximum": 99}, word=WORD), 1, 3),
    record(value={"anyOf": [{"type": "integer", "minimum": 0, "maximum": 9}, {"type": "null"}, WORD]}),
    record(shape={"oneOf": [record(kind={"const": "circle"}, radius={"type": "integer", "minimum": 1, "maximum": 9}),
                            record(kind={"const": "square"}, side={"type": "integer", "minimum": 1, "maximum": 9})]}),
    record(date={"type": "string", "pattern": "^20[0-9]{2}-(0[1-9]|1[0-2])-(0[1-9]|[12][0-9]|3[01])$"}),
    record(phone={"type": "string", "pattern": "^\\([0-9]{3}\\) [0-9]{3}-[0-9]{4}$"}, note={"type": ["string", "null"],
                                                                                           "maxLength": 15}),
    record(required=["a"], a=WORD, b=WORD, c={"type": "integer", "minimum": 0, "maximum": 1000}),
    {"type": "object", "additionalProperties": {"type": "boolean"}, "propertyNames": {"pattern": "^[a-z]{1,5}$"},
     "minProperties": 1, "maxProperties": 3},
    array({"enum": ["north", "south", "east", "west"]}, 3, 6),
    array(array({"type": "integer", "minimum": 0, "maximum": 9}, 2, 2), 2, 2),
    {"$defs": {"node": record(value={"type": "integer", "minimum": 0, "maximum": 99},
                              next={"anyOf": [{"type": "null"}, {"$ref": "#/$defs/leaf"}]}),
               "leaf": record(value=WORD)},
     "$ref": "#/$defs/node"},
    {"type": "array", "prefixItems": [WORD, {"type": "integer", "minimum": 1, "maximum": 6}, {"type": "boolean"}],
     "items": False, "minItems": 3},
    {"type": "string", "minLength": 5, "maxLength": 40},
    {"type": "number", "exclusiveMinimum": 0, "maximum": 1},
    record(text={"type": "string", "minLength": 1, "maxLength": 60}, language={"const": "en"},
           range=array({"type": "integer", "minimum": 100, "maximum": 999}, 2, 2)),
    record(items=array(record(name=WORD, price={"type": "number", "minimum": 0, "maximum": 100},
                              kind={"enum": ["food", "toy"]}), 1, 2), total={"type": "integer", "minimum": 0,
                                                                           "maximum": 500}, note=WORD),
]


def texts_of(events):
    """(text, tokens, finished) of each output."""
    return [(text_of(events, e.finished.output_index), len(tokens_of(events, e.finished.output_index)), e.finished)
            for e in events if e.HasField("finished")]


class StructuredOutputTest(unittest.TestCase):
    generations = 100
    figures = False

    @classmethod
    def setUpClass(cls):
        cls.server = Server("--ranks=1")
        cls.client = Client(cls.server.address)

    @classmethod
    def tearDownClass(cls):
        cls.client.close()
        cls.server.__exit__()

    def start(self, response_format=None, n=OUTPUTS, **sampling):
        form = {} if response_format is None else {"response_format": response_format}
        return self.client.generate(text=PROMPT, n=n, timeout=600, **form,
                                    sampling={"temperature": 1, "seed": 1, "max_tokens": 600, **sampling})

    def run_one(self, response_format, **sampling):
        return texts_of(list(self.start(response_format, **sampling)))

    def refusal(self, response_format):
        with self.assertRaises(grpc.RpcError) as raised:
            list(self.start(response_format))
        self.assertEqual(raised.exception.code(), grpc.StatusCode.INVALID_ARGUMENT)
        return raised.exception.details()

    def test_schemas(self):
        self.assertEqual(len(SCHEMAS), 20)
        seeds = range(self.generations // (len(SCHEMAS) * OUTPUTS))
        before = self.client.control("GetLoad")
        begin = time.time()
        calls = [(schema, self.start({"json_schema": json.dumps(schema)}, seed=seed))
                 for seed in seeds for schema in SCHEMAS]
        done = [(schema, texts_of(list(call))) for schema, call in calls]
        seconds = time.time() - begin
        texts, tokens = set(), []
        for schema, outputs in done:
            jsonschema.Draft202012Validator.check_schema(schema)
            self.assertEqual(len(outputs), OUTPUTS)
            for text, count, finished in outputs:
                self.assertEqual(finished.reason, STOP, text)
                jsonschema.Draft202012Validator(schema).validate(json.loads(text))
                texts.add(text)
                tokens.append(count)
        self.assertEqual(len(tokens), len(seeds) * len(SCHEMAS) * OUTPUTS)
        self.assertGreater(len(texts), 0.6 * len(tokens))  # the seeds tell
        # The same seeds again, from forms that are known by now.
        schema, outputs = done[3]
        again = texts_of(list(self.start({"json_schema": json.dumps(schema)}, seed=0)))
        self.assertEqual(sorted(o[0] for o in again), sorted(o[0] for o in outputs))
        load = self.client.control("GetLoad")
        made = load.structured_output
        self.assertEqual(made.compiled - before.structured_output.compiled, len(SCHEMAS))
        masks = made.masks - before.structured_output.masks
        self.assertGreaterEqual(masks, sum(tokens))
        mask_us = (made.mask_ns - before.structured_output.mask_ns) / 1e3 / masks
        print(f"{len(tokens)} generations under {len(SCHEMAS)} schemas, {sum(tokens)} tokens: all parse and validate; "
              f"{mask_us:.1f} us of a thread per mask, slowest {made.slowest_mask_ns / 1e3:.0f} us; compiling "
              f"{made.compile_ns / 1e6 / made.compiled:.1f} ms per schema", flush=True)
        if self.figures:
            self.print_figures(seconds, tokens)

    def print_figures(self, seconds, tokens):
        # The same numbers of tokens without a form.
        begin = time.time()
        calls = [self.start(None, n=1, max_tokens=count, seed=i, min_tokens=count) for i, count in enumerate(tokens)]
        plain = sum(count for call in calls for _, count, _ in texts_of(list(call)))
        plain_seconds = time.time() - begin
        self.assertEqual(plain, sum(tokens))
        print(f"all at once: {plain / seconds:.0f} tokens/s with a schema, {plain / plain_seconds:.0f} without")
        # Time per output token, by the server's clock, of outputs of 300 tokens.
        long = {"json_schema": json.dumps(array({"type": "integer", "minimum": 0, "maximum": 999}, 200, 200))}
        list(self.start(long, n=1, max_tokens=300))  # compiled, warm
        for formed, plain in [(1, 0), (0, 1), (8, 0), (0, 8), (4, 4), (0, 8), (8, 0), (32, 0), (0, 32), (16, 16)]:
            tpot = {long["json_schema"]: [], None: []}
            for seed in range(7):
                calls = [(form, self.start({"json_schema": form} if form else None, n=1, max_tokens=300, seed=seed + 9 * i,
                                           min_tokens=300))
                         for i in range(max(formed, plain)) for form, many in
                         [(long["json_schema"], formed), (None, plain)] if i < many]
                for form, call in calls:
                    for _, count, finished in texts_of(list(call)):
                        tpot[form].append(finished.timing.decode_ns / 1e3 / (count - 1))
            print(f"{formed} outputs with a schema and {plain} without at a time: us per output token (median of all): " +
                  ", ".join(f"{statistics.median(times):.0f} {'with' if form else 'without'}"
                            for form, times in tpot.items() if times), flush=True)

    def test_regex_choice_grammar(self):
        for text, _, finished in self.run_one({"regex": "[0-9]{3}-[a-f]{2}"}):
            self.assertRegex(text, "^[0-9]{3}-[a-f]{2}$")
            self.assertEqual(finished.reason, STOP)
            self.assertIsNone(finished.WhichOneof("stopped_by"))  # nothing can follow
        texts = ["yes", "no", "a \"quoted\" one\n"]
        seen = {text for seed in range(6) for text, _, _ in self.run_one({"choice": {"texts": texts}}, seed=seed)}
        self.assertLessEqual(seen, set(texts))
        self.assertGreater(len(seen), 1)
        for text, _, finished in self.run_one({"grammar": 'root ::= "(" root ")" | [a-z]+'}, max_tokens=60):
            self.assertRegex(text, r"^\(*[a-z]*\)*$")
            if finished.reason == STOP:
                self.assertEqual(text.count("("), text.count(")"))
        for text, _, finished in self.run_one({"json_object": {}}, max_tokens=40):
            self.assertTrue(text.lstrip().startswith("{"), text)
            if finished.reason == STOP:
                self.assertIsInstance(json.loads(text), dict)

    def test_endings(self):
        # Where it may end, an end token ends it; ignore_eos and min_tokens ban that.
        digits = {"regex": "[0-9]+"}
        outputs = self.run_one(digits, max_tokens=200)
        self.assertTrue(all(re.fullmatch("[0-9]+", text) for text, _, _ in outputs))
        self.assertIn("stop_token_id", {f.WhichOneof("stopped_by") for _, _, f in outputs})
        for text, count, finished in self.run_one(digits, max_tokens=30, min_tokens=30):
            self.assertEqual((count, finished.reason), (30, LENGTH), text)
        events = list(self.client.generate(text=PROMPT, n=3, stop={"ignore_eos": True}, response_format=digits,
                                           sampling={"max_tokens": 25}))
        self.assertEqual({(c, f.reason) for _, c, f in texts_of(events)}, {(25, LENGTH)})
        # A form that is complete ends the output before min_tokens, and with ignore_eos.
        events = list(self.client.generate(text=PROMPT, stop={"ignore_eos": True}, response_format={"regex": "a{4}"},
                                           sampling={"max_tokens": 25, "min_tokens": 20}))
        self.assertEqual([(t, f.reason) for t, _, f in texts_of(events)], [("aaaa", STOP)])
        # Bans that leave nothing.
        ids = self.client.call("soloist.v1.InferenceService", "Tokenize", text="x", add_special_tokens=False).token_ids
        [(text, _, finished)] = self.run_one({"regex": "x"}, n=1,
                                             logit_bias=[{"token_id": i, "bias": float("-inf")} for i in ids])
        self.assertEqual((text, finished.reason, finished.error.retryable), ("", ERROR, False))
        self.assertIn("ban every token that the output's form allows", finished.error.message)

    def test_logprobs_are_the_models(self):
        def top(form):
            events = list(self.client.generate(text=PROMPT, logprobs=5, sampling={"temperature": 0, "max_tokens": 1},
                                               **({"response_format": form} if form else {})))
            [entry] = [l for e in events if e.HasField("delta") for l in e.delta.logprobs]
            return [(t.token_id, t.logprob) for t in entry.top], entry.chosen
        plain, _ = top(None)
        masked, chosen = top({"regex": "[0-9]{5}"})
        self.assertEqual(plain, masked)
        self.assertRegex(chosen.token_bytes.decode(), "^[0-9]+$")
        self.assertLess(chosen.logprob, plain[-1][1])

    def test_with_and_without_in_one_batch(self):
        alone = texts_of(list(self.start(None, n=2, max_tokens=80, seed=5)))
        schema = json.dumps(SCHEMAS[0])
        calls = [self.start({"json_schema": schema}, seed=7), self.start(None, n=2, max_tokens=80, seed=5),
                 self.start({"json_schema": schema}, seed=7)]
        first, plain, second = [texts_of(list(call)) for call in calls]
        by_index = lambda outputs: sorted((f.output_index, text) for text, _, f in outputs)
        self.assertEqual(by_index(plain), by_index(alone))
        self.assertEqual(by_index(first), by_index(second))

    def test_refusals(self):
        self.assertEqual(self.refusal({}), "the response format names none")
        self.assertEqual(self.refusal({"json_schema": '{"type": "strin"}'}),
                         'json_schema: Unsupported type "strin"')
        self.assertIn("'not' at '#/properties/a'",
                      self.refusal({"json_schema": json.dumps({"properties": {"a": {"not": {}}}})}))
        self.assertIn("syntax error", self.refusal({"json_schema": "{"}))
        self.assertIn("not closed", self.refusal({"regex": "(a"}))
        self.assertIn('"root" is not found', self.refusal({"grammar": "top ::= \"a\""}))
        self.assertEqual(self.refusal({"choice": {"texts": []}}), "choice: there is none")
        limits = self.client.control("GetServerInfo").limits
        self.assertIn(f"the limit is {limits.max_response_format_bytes}",
                      self.refusal({"regex": "a" * (limits.max_response_format_bytes + 1)}))


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--generations", type=int, default=StructuredOutputTest.generations)
    parser.add_argument("--figures", action="store_true")
    flags, rest = parser.parse_known_args()
    StructuredOutputTest.generations = flags.generations
    StructuredOutputTest.figures = flags.figures
    unittest.main(argv=[sys.argv[0], *rest], verbosity=2)
