"""Workers that are lost and not replaced, under load: the others take their experts, and give them back.

    run.sh shrink_process_test.py [--workers=N] [--losses=N] [--replace-timeout=S]     default 8, 6 and 0.5
"""

import os
import random
import re
import signal
import statistics
import subprocess
import sys
import time
import unittest

sys.path.insert(0, os.environ["SOLOIST_CLIENT_DIR"])
from soloist_client import Server, client_of, tokens_of  # noqa: E402
from streams import Streams, requests_of  # noqa: E402

SOLOIST = os.environ["SOLOIST"]
WORKERS = 8
LOSSES = 6
STREAMS = 16
REPLACE_TIMEOUT = 0.5


class Cluster:
    """A leader, and workers that nobody starts again."""

    def __init__(self):
        self.server = Server(f"--workers={WORKERS}", "--cluster-address=127.0.0.1:0", "--on-loss=shrink",
                             f"--replace-timeout={REPLACE_TIMEOUT}", "--threads=1", wait_ready=False)
        self.address = self.said(r" workers at (\S+)")
        self.workers = {}
        for rank in range(WORKERS):
            self.start(rank)
        if not self.server.ready.wait(120):
            raise RuntimeError("not ready: " + "".join(self.server.lines))

    def said(self, pattern, timeout=30):
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            found = re.search(pattern, "".join(self.server.lines))
            if found:
                return found.group(1)
            time.sleep(0.02)
        raise RuntimeError(f"{pattern}: " + "".join(self.server.lines))

    def start(self, rank):
        self.workers[rank] = subprocess.Popen(
            [SOLOIST, "worker", "--leader=" + self.address, f"--rank={rank}", "--threads=1",
             "--comm-address=127.0.0.1", "--leader-timeout=5", "--log-level=warn"])

    def end(self, rank):
        worker = self.workers.pop(rank)
        worker.kill()
        worker.wait()

    def close(self):
        for rank in list(self.workers):
            self.end(rank)
        self.server.__exit__()


class ShrinkTest(unittest.TestCase):
    def setUp(self):
        self.cluster = Cluster()
        self.addCleanup(self.cluster.close)

    def homes(self, client):
        """Of the experts: the ranks that have them; and the homes that have KV blocks."""
        load = client.control("GetLoad")
        return [e.rank for e in load.experts], [i for i, home in enumerate(load.homes) if home.total_blocks > 0]

    def until(self, client, ranks):
        """Waits until just these ranks are in force; how long that took."""
        begin = time.monotonic()
        while time.monotonic() < begin + 60:
            experts, homes = self.homes(client)
            if set(experts) == set(homes) == set(ranks):
                return time.monotonic() - begin
            time.sleep(0.02)
        self.fail(f"experts at {experts}, homes {homes}, expected {sorted(ranks)}: " +
                  "".join(self.cluster.server.lines[-20:]))

    def test_streams_survive_losses_without_replacement(self):
        with client_of(self.cluster.server) as client:
            requests = requests_of(STREAMS)
            expected = [tokens_of(list(client.generate(**r))) for r in requests]
            whole, _ = self.homes(client)
            streams = Streams(client, requests, expected)
            pauses, returns = [], []
            present = set(range(WORKERS))
            try:
                while sum(count for count, _, _ in pauses) < LOSSES:
                    # Some of them, one after another or several in a second, as long as one is left; then all come back.
                    left = min(LOSSES - sum(count for count, _, _ in pauses), random.randint(2, WORKERS - 1))
                    while left > 0:
                        count = min(left, random.choice([1, 1, 1, 2]))
                        left -= count
                        time.sleep(random.uniform(0.1, 0.6))
                        self.lose(client, streams, present, pauses, count)
                    begin = time.monotonic()
                    for rank in sorted(set(range(WORKERS)) - present):
                        self.cluster.end(rank)
                        self.cluster.start(rank)
                    present = set(range(WORKERS))
                    self.until(client, present)
                    returns.append(streams.longest_wait(begin))
                    self.assertEqual(self.homes(client)[0], whole)
                    self.assertEqual(client.control("Health").state, 2, client.control("Health"))
            finally:
                streams.stop()
        self.assertEqual(streams.errors, [])
        self.assertGreater(streams.done, 0)
        print(f"{WORKERS} workers, {STREAMS} streams, --replace-timeout={REPLACE_TIMEOUT}: "
              f"{sum(count for count, _, _ in pauses)} losses; {streams.done} requests, 0 failed, 0 wrong. "
              "Longest wait for a token of any stream, s:")
        kinds = {"one, SIGKILL": [w for count, how, w in pauses if count == 1 and how == {signal.SIGKILL}],
                 "one, SIGSTOP": [w for count, how, w in pauses if count == 1 and how == {signal.SIGSTOP}],
                 "two within a second": [w for count, _, w in pauses if count > 1],
                 "all that were lost come back": returns}
        for kind, waits in kinds.items():
            waits.sort()
            if waits:
                print(f"  {kind}: {len(waits)} times, min {waits[0]:.2f}, median {statistics.median(waits):.2f}, "
                      f"90% {waits[int(0.9 * (len(waits) - 1))]:.2f}, most {waits[-1]:.2f}")

    def lose(self, client, streams, present, pauses, count):
        victims = random.sample(sorted(present), count)
        begin = time.monotonic()
        hows = set()
        for victim in victims:
            hows.add(how := random.choice([signal.SIGKILL, signal.SIGSTOP]))
            self.cluster.workers[victim].send_signal(how)
            present.remove(victim)
            if victim != victims[-1]:
                time.sleep(random.uniform(0, 1))
        self.until(client, present)
        pauses.append((count, hows, streams.longest_wait(begin)))
        health = client.control("Health")
        self.assertEqual(health.state, 3, health)
        checks = {check.name: check for check in health.checks}
        for victim in victims:
            self.assertFalse(checks[f"rank/{victim}"].ok)
            self.assertRegex(checks[f"rank/{victim}"].message, r"lost .* its experts are with rank \d")


if __name__ == "__main__":
    for argument in [a for a in sys.argv[1:] if "=" in a]:
        name, value = argument.removeprefix("--").split("=")
        globals()[name.upper().replace("-", "_")] = float(value) if "." in value else int(value)
        sys.argv.remove(argument)
    unittest.main(verbosity=2)
