"""`soloist bench serve` against a real server: counts, token totals against the server's own, cancellation, refusals."""

import csv
import json
import os
import re
import subprocess
import tempfile
import time
import unittest
import xml.etree.ElementTree

from soloist_client import Server, client_of

DISTRIBUTIONS = ["ttft_ms", "tpot_ms", "itl_ms", "chunk_gap_ms", "latency_ms", "engine_queue_ms", "engine_ttft_ms",
                 "network_ttft_ms", "client_lag_ms"]


def soloist(*arguments):
    return subprocess.run([os.environ["SOLOIST"], *arguments], capture_output=True, text=True, timeout=60, check=False)


class BenchServeTest(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.server = cls.enterClassContext(Server("--ranks=1"))
        cls.client = cls.enterClassContext(client_of(cls.server))
        cls.scratch = cls.enterClassContext(tempfile.TemporaryDirectory())

    def path(self, name):
        return os.path.join(self.scratch, name)

    def bench(self, name, *flags):
        """The run's JSON and its terminal text."""
        done = soloist("bench", "serve", f"--address={self.server.address}", f"--json={self.path(name)}", *flags)
        self.assertEqual(done.returncode, 0, done.stderr + done.stdout)
        with open(self.path(name), encoding="utf-8") as file:
            return json.load(file), done.stdout

    def load(self):
        return self.client.control("GetLoad")

    def test_tokens_equal_the_servers_own_count(self):
        before = self.load()
        result, text = self.bench("all.json", "--requests=12", "--input-length=uniform:5:20", "--output-length=16",
                                  "--rate=40", "--goodput=ttft:60000,tpot:60000", f"--csv={self.path('all.csv')}",
                                  f"--html={self.path('all.html')}",
                                  "--max-lag-ms=60000")
        after = self.load()
        summary = result["summary"]
        self.assertEqual(summary["outcomes"], {"ok": 12})
        self.assertEqual(summary["output_tokens"], 12 * 16)
        self.assertEqual(summary["received_tokens"], after.generated_tokens - before.generated_tokens)
        self.assertEqual(summary["prompt_tokens"], sum(r["prompt_tokens"] for r in result["requests"]))
        self.assertEqual(after.finished_requests - before.finished_requests, 12)
        for name in DISTRIBUTIONS:
            self.assertEqual(set(summary[name]), {"count", "mean", "median", "p90", "p99", "p999", "max"}, name)
        self.assertEqual(summary["ttft_ms"]["count"], 12)
        self.assertEqual(summary["itl_ms"]["count"], 12 * 15)
        self.assertGreater(summary["engine_ttft_ms"]["median"], 0)
        self.assertAlmostEqual(summary["output_tokens_per_s"] * summary["wall_s"], 12 * 16, places=3)
        self.assertAlmostEqual(result["goodput"]["requests_per_s"], summary["requests_per_s"])
        self.assertTrue(result["valid"])
        self.assertIn("output ", text)
        self.assertIn("total (prompt + output)", text)
        with open(self.path("all.csv"), encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        self.assertEqual([row["outcome"] for row in rows], ["ok"] * 12)
        self.assertEqual([int(row["output_tokens"]) for row in rows], [16] * 12)

        with open(self.path("all.html"), encoding="utf-8") as file:
            page = file.read()
        shapes = re.findall(r'<polyline class="s0" points="([^"]*)"', page)
        self.assertEqual(len(shapes), 5)
        self.assertTrue(all(len(points.split()) >= 12 for points in shapes))
        self.assertIn("ttft_ms", page)
        self.assertNotRegex(page, r"(src|href)=|url\(|<script")  # asks for nothing
        for svg in re.findall(r"<svg.*?</svg>", page, re.S):
            xml.etree.ElementTree.fromstring(svg)

    def test_cancelled_requests_leave_the_server(self):
        result, _ = self.bench("cancel.json", "--requests=8", "--input-length=8", "--output-length=1000",
                               "--concurrency=4", "--cancel-share=1")
        self.assertEqual(result["summary"]["outcomes"], {"cancelled": 8})
        self.assertEqual(result["summary"]["output_tokens"], 0)
        for request in result["requests"]:
            self.assertGreaterEqual(request["output_tokens"], 500)
            self.assertLess(request["output_tokens"], 1000)
        deadline = time.time() + 10
        while self.load().running_requests and time.time() < deadline:
            time.sleep(0.02)
        self.assertEqual(self.load().running_requests, 0)

    def test_refusals_are_counted_by_kind(self):
        too_long = self.client.control("GetModelInfo").max_model_len
        result, text = self.bench("refused.json", "--requests=3", "--input-length=8", f"--output-length={too_long}")
        self.assertEqual(result["summary"]["outcomes"], {"INVALID_ARGUMENT": 3})
        self.assertIn("3 INVALID_ARGUMENT", text)

    def test_trace_and_compare(self):
        with open(self.path("trace.jsonl"), "w", encoding="utf-8") as file:
            for i in range(5):
                file.write(json.dumps({"timestamp": 20 * i, "input_length": 10 + i, "output_length": 4 + i,
                                       "hash_ids": [i]}) + "\n")
        result, _ = self.bench("trace.json", f"--trace={self.path('trace.jsonl')}", "--warmup=2")
        self.assertEqual([(r["prompt_tokens"], r["output_tokens"]) for r in result["requests"]],
                         [(10 + i, 4 + i) for i in range(5)])
        for i, request in enumerate(result["requests"]):
            self.assertAlmostEqual(request["intended_ms"], 20 * i)
        compared = soloist("bench", "compare", self.path("trace.json"), self.path("trace.json"))
        self.assertEqual(compared.returncode, 0, compared.stderr)
        self.assertIn("latency_ms   1.000 [", compared.stdout)
        self.assertIn("output tok/s 1.000 [", compared.stdout)
        # The same answers in half of the time: latency halved, tokens/s doubled.
        with open(self.path("trace.json"), encoding="utf-8") as file:
            run = json.load(file)
        for request in run["requests"]:
            for key in ("intended_ms", "latency_ms", "ttft_ms"):
                if request.get(key) is not None:
                    request[key] /= 2
        with open(self.path("twice.json"), "w", encoding="utf-8") as file:
            json.dump(run, file)
        compared = soloist("bench", "compare", self.path("trace.json"), self.path("twice.json"))
        self.assertIn("latency_ms   0.500 [", compared.stdout)
        self.assertIn("output tok/s 2.000 [", compared.stdout)

    def test_sweep_writes_each_point(self):
        result, text = self.bench("sweep.json", "--sweep=concurrency:1:4", "--requests=6", "--input-length=8",
                                  "--output-length=4", "--goodput=e2e:60000", "--max-lag-ms=60000",
                                  f"--html={self.path('sweep.html')}")
        sweep = result["sweep"]
        self.assertEqual([point["load"] for point in sweep["points"]], [1, 2, 4])
        self.assertEqual((sweep["knee"], sweep["at_limit"], sweep["of"]), (4, True, "concurrency"))
        self.assertIn("at least 99% of the requests meet e2e:60000", sweep["rule"])
        for point in sweep["points"]:
            self.assertTrue(point["sustained"] and point["valid"])
            self.assertEqual(point["summary"]["output_tokens"], 24)
            self.assertEqual(point["summary"]["goodput_share"], 1)
        self.assertEqual(result["flags"]["--sweep"], "concurrency:1:4")
        self.assertIn("knee (concurrency): 4 or above", text)
        with open(self.path("sweep.html"), encoding="utf-8") as file:
            self.assertEqual(file.read().count("<circle"), 4 * 2 * 3)

    def test_dataset_stages_and_duration(self):
        answer = "and they lived happily ever after"
        with open(self.path("dataset.jsonl"), "w", encoding="utf-8") as file:
            for turn in [{"prompt": "Once upon a time", "output_len": 3},
                         {"conversations": [{"from": "human", "value": "Tell me"}, {"from": "gpt", "value": answer}]}]:
                file.write(json.dumps(turn) + "\n")
        result, _ = self.bench("dataset.json", f"--dataset={self.path('dataset.jsonl')}")
        tokens = self.client.call("soloist.v1.InferenceService", "Tokenize", text=answer, add_special_tokens=False).token_ids
        self.assertEqual([r["output_tokens"] for r in result["requests"]], [3, len(tokens)])
        self.assertTrue(all(r["prompt_tokens"] > 0 for r in result["requests"]))
        result, _ = self.bench("stages.json", "--rate=0:0.2,0-100:0.4,50:10", "--duration=0.8", "--input-length=4",
                               "--output-length=2", "--max-lag-ms=60000")
        sent_ms = [r["intended_ms"] for r in result["requests"]]
        self.assertEqual(sent_ms, sorted(sent_ms))
        self.assertLess(sent_ms[-1], 800)
        self.assertTrue(8 <= len(sent_ms) <= 60, len(sent_ms))  # Poisson, 30 expected
        self.assertEqual(result["summary"]["outcomes"], {"ok": len(sent_ms)})

    def test_invalid_flags_are_refused_with_a_sentence(self):
        address = f"--address={self.server.address}"
        for flags, expected in [
                (["--input-length=zipf:3:4"], "length 'zipf:3:4': not N, uniform:LOW:HIGH"),
                (["--goodput=itl:3"], "--goodput: 'itl' is not ttft, tpot or e2e"),
                (["--rate=3", "--concurrency=2"], "excludes"),
                (["--trace=/nonexistent"], "--trace: cannot open '/nonexistent'"),
                (["--address=127.0.0.1:1"], "127.0.0.1:1: "),
                (["--rate=5:"], "--rate: '5:' is not VALUE, nor stages"),
                (["--duration=5"], "--duration=5: says when to stop sending"),
                (["--sweep=rate:1:2"], "--goodput"),
                (["--sweep=rate:2:1", "--goodput=ttft:1"], "--sweep: 'rate:2:1' is not rate:LOW:HIGH"),
                (["--address=http://127.0.0.1:1", "--endpoint=chat"], "127.0.0.1:1/v1/models: "),
                (["--address=https://127.0.0.1:1"], "no TLS here"),
                (["--requests=0"], "--requests")]:
            done = soloist("bench", "serve", address, *flags) if "--address" not in flags[0] else soloist(
                "bench", "serve", *flags)
            self.assertNotEqual(done.returncode, 0, flags)
            self.assertIn(expected, done.stderr + done.stdout)
        done = soloist("bench", "compare", "/nonexistent", "/nonexistent")
        self.assertIn("cannot open '/nonexistent'", done.stderr)


if __name__ == "__main__":
    unittest.main()
