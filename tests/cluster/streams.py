"""Load for tests of lost workers: streams that never stop asking, and compare each answer with the right one."""

import os
import sys
import threading
import time

sys.path.insert(0, os.environ["SOLOIST_CLIENT_DIR"])
from soloist_client import tokens_of  # noqa: E402


def requests_of(count, max_tokens=60):
    """Half of them greedy, half drawn with a seed."""
    return [{"text": f"Once upon a time, number {i}", "stop": {"ignore_eos": True},
             "sampling": {"temperature": 0.8 * (i % 2), "seed": i, "max_tokens": max_tokens}} for i in range(count)]


class Streams:
    """Asks for each request again and again, on a thread of its own, and compares what comes with what must."""

    def __init__(self, client, requests, expected):
        self.client, self.requests, self.expected = client, requests, expected
        self.times, self.errors, self.done = [], [], 0
        self.stopping = threading.Event()
        self.threads = [threading.Thread(target=self._run, args=(i,)) for i in range(len(requests))]
        for thread in self.threads:
            thread.start()

    def _run(self, i):
        while not self.stopping.is_set():
            tokens = []
            try:
                for event in self.client.generate(timeout=120, **self.requests[i]):
                    self.times.append(time.monotonic())
                    tokens += tokens_of([event])
            except Exception as error:  # noqa: BLE001  # whatever it is, the test must say so
                self.errors.append(f"stream {i}: {error}")
                return
            if tokens != self.expected[i]:
                self.errors.append(f"stream {i}: {tokens} instead of {self.expected[i]}")
            self.done += 1

    def longest_wait(self, since):
        """Up to a token that comes after this call: what was lost is over by then."""
        have, deadline = len(self.times), time.monotonic() + 60
        while len(self.times) == have and not self.errors:
            if time.monotonic() > deadline:
                raise RuntimeError("no token for 60 s")
            time.sleep(0.005)
        times = [t for t in sorted(self.times) if t >= since]
        return max(b - a for a, b in zip([since, *times], times))

    def stop(self):
        self.stopping.set()
        for thread in self.threads:
            thread.join(180)
