"""64 concurrent streams with random cancels and slow readers: no error that was not asked for, nothing leaks.

SOAK_SECONDS says how long (default 20).
"""

import collections
import os
import random
import threading
import time
import unittest

import grpc

from soloist_client import Client, Server, tokens_of

SECONDS = float(os.environ.get("SOAK_SECONDS", "20"))
STREAMS = 64
PROMPTS = ["Once upon a time", "The little dragon", "One day, Lily and Ben", "In a big forest there was", "Tom had a red ball"]


class Soak:
    def __init__(self, client, seconds):
        self.client = client
        self.stop_at = time.time() + seconds
        self.counts = collections.Counter()
        self.errors = []
        self.lock = threading.Lock()

    def stream(self, index):
        rng = random.Random(index)
        while time.time() < self.stop_at:
            what = rng.choices(["read", "cancel", "deadline", "slow", "stop string"], [50, 20, 10, 10, 10])[0]
            try:
                self.one(rng, what)
                outcome = "ok"
            except grpc.RpcError as error:
                outcome = error.code().name
            except AssertionError as error:
                outcome = "wrong"
                with self.lock:
                    self.errors.append(f"{what}: {error}")
            with self.lock:
                self.counts[what, outcome] += 1

    def one(self, rng, what):
        max_tokens = rng.randint(1, 200)
        fields = {"text": rng.choice(PROMPTS), "n": rng.choice([1, 1, 1, 2]),
                  "sampling": {"max_tokens": max_tokens, "temperature": rng.choice([0, 0.8]), "seed": rng.randrange(1000)},
                  "stop": {"ignore_eos": True, "strings": [" the"] if what == "stop string" else []}}
        if rng.random() < 0.2:
            fields["logprobs"] = rng.randint(0, 5)
        timeout = rng.uniform(0.01, 0.5) if what == "deadline" else 120
        call = self.client.generate(timeout=timeout, **fields)
        cancel_at = rng.randint(0, max_tokens)
        events = []
        for event in call:
            events.append(event)
            if what == "cancel" and len(events) > cancel_at:
                call.cancel()
            if what == "slow":
                time.sleep(0.02)
        if what in ("read", "slow"):
            for output in range(fields["n"]):
                got = len(tokens_of(events, output))
                assert got == max_tokens, f"output {output} has {got} tokens of {max_tokens}"
            assert events[-1].HasField("completed")

    def run(self, streams=STREAMS):
        threads = [threading.Thread(target=self.stream, args=(i,)) for i in range(streams)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()


def used(load):
    return sum(h.used_blocks for h in load.homes) + load.running_requests + load.waiting_requests + load.open_streams


class SoakTest(unittest.TestCase):
    def test_soak(self):
        # Under the address sanitizer, freed memory would be kept as if it leaked.
        os.environ["ASAN_OPTIONS"] = os.environ.get("ASAN_OPTIONS", "") + ":quarantine_size_mb=1"
        # A small pool: sequences are preempted.
        with Server("--ranks=4", "--num-blocks=96", "--max-sequences=32") as server:
            client = Client(server.address)
            warm = Soak(client, SECONDS / 3)
            warm.run()
            before = server.resident_bytes()
            soak = Soak(client, SECONDS)
            soak.run()
            deadline = time.time() + 30
            while used(client.control("GetLoad")) and time.time() < deadline:
                time.sleep(0.05)
            load = client.control("GetLoad")
            after = server.resident_bytes()
            client.close()
            print(f"\n{dict(soak.counts)}\npreemptions {load.preemptions}, generated {load.generated_tokens} tokens, "
                  f"resident {before / 1e6:.1f} -> {after / 1e6:.1f} MB")
            self.assertEqual(used(load), 0, load)
            self.assertEqual(soak.errors, [])
            asked = {("cancel", "CANCELLED"), ("deadline", "DEADLINE_EXCEEDED")}
            self.assertEqual([k for k in soak.counts if k[1] != "ok" and k not in asked], [])
            self.assertGreater(load.preemptions, 0)
            # 10% of what stands there, and some arena growth of malloc.
            self.assertLess(after, before * 1.1 + 8e6)
            self.assertEqual(server.terminate(), 0)


if __name__ == "__main__":
    unittest.main(verbosity=2)
