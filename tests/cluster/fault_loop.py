"""Random faults under load, on workers in network namespaces: SIGKILL, SIGSTOP, and the network of a host cut.

    run.sh fault_loop.py [--hosts=N] [--workers=N] [--streams=N] [--spares=N] [--shrink=N] [--seed=N] [--kinds=A,B,C]

--hosts with --workers each (default 2 and 2), --streams (8); --spares and --shrink: faults of each kind (default 1),
with spare workers that take the place, as many as a host has workers, on one host more; and without a replacement, by
--on-loss=shrink.
Every stream asks again and again, and each answer is compared with that of one rank in one process.
"""

import os
import random
import re
import signal
import statistics
import sys
import time
import unittest

from netns import BRIDGE_ADDRESS, Network, enter, why_not
from streams import Streams, requests_of

sys.path.insert(0, os.environ["SOLOIST_CLIENT_DIR"])
from soloist_client import Server, client_of, tokens_of  # noqa: E402

SOLOIST = os.environ["SOLOIST"]
KINDS = ["kill", "stop", "cut"]
SETTINGS = {"hosts": 2, "workers": 2, "streams": 8, "spares": 1, "shrink": 1, "seed": random.randrange(1 << 30),
            "kinds": ",".join(KINDS)}
REASON = why_not("iptables -I INPUT -j DROP") if os.environ.get("SOLOIST_NETNS") != "1" else ""
SERVING, DEGRADED = 2, 3
PATIENCE_S = 240  # far above any pause: on a starved machine processes take minutes to start
LEADER = f"{BRIDGE_ADDRESS}:50052"


class Cluster:
    """A leader on the bridge, and workers on the hosts that nobody but the test starts again."""

    SAID = {r"pid (\d+) on \S+ becomes rank": "rank", r"pid (\d+) on \S+ is a spare": "spare",
            r" is lost \(pid (\d+) ": "lost"}

    def __init__(self, network, ranks, spares, *flags):
        self.network = network
        self.workers = {}  # of the workers that should be alive: pid -> (process, host, flags)
        self.server = Server(f"--workers={ranks}", f"--spares={spares}", "--cluster-address=" + LEADER, "--threads=1",
                             *flags, wait_ready=False)

    def start(self, host, *flags):
        worker = host.popen(SOLOIST, "worker", "--leader=" + LEADER, "--comm-address=" + host.address, "--threads=1",
                            "--leader-timeout=120", "--log-level=error", *flags)
        self.workers[worker.pid] = (worker, host, flags)

    def end(self, pid):
        worker, host, flags = self.workers.pop(pid)
        worker.kill()
        worker.wait()
        return host, flags

    def restart(self, pid):
        host, flags = self.end(pid)
        self.start(host, *flags)

    def states(self):
        """What the leader has said of each worker last: rank, spare or lost."""
        states = {pid: "rank" for pid in self.workers}
        for line in list(self.server.lines):
            for pattern, state in self.SAID.items():
                if found := re.search(pattern, line):
                    states[int(found.group(1))] = state
        return {pid: states[pid] for pid in self.workers}

    def on(self, host):
        return [pid for pid, (_, where, _) in self.workers.items() if where is host]

    def close(self):
        for pid in list(self.workers):
            self.end(pid)
        self.server.__exit__()


@unittest.skipIf(REASON, "SKIPPED: no network namespaces here: " + REASON)
class FaultTest(unittest.TestCase):
    def setUp(self):
        self.random = random.Random(SETTINGS["seed"])
        self.pauses = {kind: [] for kind in [*KINDS, "all come back"]}
        self.ranks = SETTINGS["hosts"] * SETTINGS["workers"]

    def start(self, mode, hosts, spares, *flags):
        requests = requests_of(SETTINGS["streams"])
        with Server("--ranks=1", "--threads=1") as alone, client_of(alone) as client:
            expected = [tokens_of(list(client.generate(**r))) for r in requests]
        network = Network(hosts, "1gbit")
        self.addCleanup(network.close)
        self.cluster = Cluster(network, self.ranks, spares, *flags)
        self.addCleanup(self.cluster.close)
        for index in range(self.ranks + spares):
            rank = [] if spares else [f"--rank={index}"]
            self.cluster.start(network.hosts[index // SETTINGS["workers"]], *rank)
        self.assertTrue(self.cluster.server.ready.wait(PATIENCE_S), self.cluster.server.lines)
        client = self.enterContext(client_of(self.cluster.server))
        streams = Streams(client, requests, expected)
        self.addCleanup(self.report, mode, streams, time.monotonic())
        self.addCleanup(streams.stop)
        return client, streams

    def until(self, what, done):
        deadline = time.monotonic() + PATIENCE_S
        while not done():
            if time.monotonic() > deadline:
                said = [line for line in self.cluster.server.lines if " request {" not in line]
                self.fail(f"{what}: not within {PATIENCE_S} s: " + "".join(said[-40:]))
            time.sleep(0.02)

    def strike(self, kind, victim):
        """Does it to the worker, or to its host; how to undo it: all that were hit live again then."""
        host = self.cluster.workers[victim][1]
        if kind == "kill":
            os.kill(victim, signal.SIGKILL)
            return lambda: self.cluster.restart(victim)
        if kind == "stop":
            os.kill(victim, signal.SIGSTOP)
            if self.random.random() < 0.5:
                return lambda: self.cluster.restart(victim)
            return lambda: os.kill(victim, signal.SIGCONT)
        silently = self.random.random() < 0.5
        host.cut(silently)
        return lambda: host.mend(silently)

    def faults(self, count):
        kinds = [kind for kind in SETTINGS["kinds"].split(",") for _ in range(count)]
        self.random.shuffle(kinds)
        return kinds

    def report(self, mode, streams, begin):
        """What has happened, also where the test has failed."""
        faults = sum(len(pauses) for kind, pauses in self.pauses.items() if kind in KINDS)
        print(f"{mode}: {SETTINGS['hosts']} hosts x {SETTINGS['workers']} workers, {SETTINGS['streams']} streams, seed "
              f"{SETTINGS['seed']}: {faults} faults in {time.monotonic() - begin:.0f} s; {streams.done} requests, "
              f"{len(streams.errors)} failed or wrong. Longest wait for a token of any stream from the fault on, s:")
        for kind, pauses in self.pauses.items():
            if pauses := sorted(pauses):
                print(f"  {kind}: {len(pauses)} times, min {pauses[0]:.2f}, median {statistics.median(pauses):.2f}, "
                      f"90% {pauses[int(0.9 * (len(pauses) - 1))]:.2f}, most {pauses[-1]:.2f}; "
                      f"{sum(p < 5 for p in pauses)} below 5", flush=True)

    def finish(self, streams):
        streams.stop()
        self.assertEqual(streams.errors, [])
        self.assertGreater(streams.done, 0)

    def test_spares_take_the_place(self):
        client, streams = self.start("spares", SETTINGS["hosts"] + 1, SETTINGS["workers"])

        def settled():
            return (set(self.cluster.states().values()) == {"rank", "spare"} and
                    list(self.cluster.states().values()).count("rank") == self.ranks and
                    client.control("Health").state == SERVING)

        for kind in self.faults(SETTINGS["spares"]):
            self.until("all ranks and spares are there", settled)
            time.sleep(self.random.uniform(0.1, 1))
            victim = self.random.choice([pid for pid, state in self.cluster.states().items() if state == "rank"])
            recoveries = client.control("GetLoad").recoveries
            at = time.monotonic()
            undo = self.strike(kind, victim)
            self.until(f"{kind}: recovered", lambda before=recoveries: client.control("GetLoad").recoveries > before and
                       client.control("Health").state == SERVING)
            self.pauses[kind].append(streams.longest_wait(at))
            self.assertEqual(streams.errors, [])
            undo()
        self.until("all ranks and spares are there", settled)
        self.finish(streams)

    def test_others_take_the_experts(self):
        client, streams = self.start("shrink", SETTINGS["hosts"], 0, "--on-loss=shrink", "--replace-timeout=0.5")
        rank_of = lambda pid: int(self.cluster.workers[pid][2][0].removeprefix("--rank="))  # noqa: E731

        def in_force(ranks):
            load = client.control("GetLoad")
            homes = {i for i, home in enumerate(load.homes) if home.total_blocks > 0}
            return {e.rank for e in load.experts} == homes == ranks

        present, undos, whole = set(range(self.ranks)), [], set(range(self.ranks))
        for kind in self.faults(SETTINGS["shrink"]):
            victim = self.random.choice([pid for pid in self.cluster.workers if rank_of(pid) in present])
            hit = self.cluster.on(self.cluster.workers[victim][1]) if kind == "cut" else [victim]
            time.sleep(self.random.uniform(0.1, 1))
            at = time.monotonic()
            undos.append(self.strike(kind, victim))
            present -= {rank_of(pid) for pid in hit}
            self.until(f"{kind}: ranks {present} have all experts", lambda: in_force(present))
            self.pauses[kind].append(streams.longest_wait(at))
            self.assertEqual(client.control("Health").state, DEGRADED)
            self.assertEqual(streams.errors, [])
            # Nobody can lose its last host: two thirds of the ranks stay, or all come back.
            if len(present) <= 2 * self.ranks // 3 or SETTINGS["hosts"] <= 2 or self.random.random() < 0.5:
                at = time.monotonic()
                for undo in reversed(undos):
                    undo()
                present, undos = set(whole), []
                self.until("all are there again", lambda: in_force(whole))
                self.pauses["all come back"].append(streams.longest_wait(at))
        for undo in reversed(undos):
            undo()
        self.until("all are there again", lambda: in_force(whole))
        self.finish(streams)


if __name__ == "__main__":
    for argument in [a for a in sys.argv[1:] if "=" in a]:
        name, value = argument.removeprefix("--").split("=")
        SETTINGS[name] = type(SETTINGS[name])(value)
    if not REASON:
        enter()
    sys.argv = [a for a in sys.argv if "=" not in a]
    unittest.main(verbosity=2, failfast=True)
