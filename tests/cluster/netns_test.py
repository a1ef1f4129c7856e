"""Sixteen workers on four hosts with a bad network: 50 Mbit/s a link, 1% of packets lost, a slow stream to the leader.

    run.sh netns_test.py [--tokens=N] [--goldens=N]     default 4 and 24
"""

import json
import os
import subprocess
import sys
import tempfile
import time
import unittest

from netns import BRIDGE_ADDRESS, Network, SlowProxy, enter, why_not

SOLOIST, MODEL = os.environ["SOLOIST"], os.environ["SOLOIST_MODEL"]
HOSTS, WORKERS_PER_HOST = 4, 4
TOKENS = 4
GOLDENS = 24
DELAY_S = 0.005
REASON = why_not() if os.environ.get("SOLOIST_NETNS") != "1" else ""


def goldens():
    with open(os.path.join(MODEL, "golden", "prompts.jsonl"), encoding="utf-8") as file:
        return [json.loads(line) for line in file][:GOLDENS]


class Generate:
    """`soloist generate` of the goldens, greedily, and its answers or its complaint."""

    def __init__(self, *flags):
        self.input = tempfile.NamedTemporaryFile("w", suffix=".jsonl")
        for golden in goldens():
            self.input.write(json.dumps({"prompt_token_ids": golden["ids"], "max_tokens": TOKENS}) + "\n")
        self.input.flush()
        self.process = subprocess.Popen(
            [SOLOIST, "generate", "--model=" + MODEL, "--json", "--temperature=0", "--ignore-eos", "--threads=1",
             "--input=" + self.input.name, *flags], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    def end(self):
        """Status, answers, and what it has said."""
        out, errors = self.process.communicate(timeout=240)
        self.input.close()
        return self.process.returncode, [json.loads(line)["token_ids"] for line in out.splitlines()], errors


def start_worker(host, rank, leader):
    return host.popen(SOLOIST, "worker", "--leader=" + leader, f"--rank={rank}", "--comm-address=" + host.address,
                      "--threads=1", "--leader-timeout=20", "--log-level=off")


@unittest.skipIf(REASON, "SKIPPED: no network namespaces here: " + REASON)
class BadNetworkTest(unittest.TestCase):
    def test_tokens_of_sixteen_workers_on_four_hosts_are_one_ranks(self):
        begin = time.monotonic()
        _, alone, _ = Generate().end()
        with Network(HOSTS, "50mbit") as network:
            try:
                for host in network.hosts:
                    host.drop_some(0.01)
                cannot = ""
            except RuntimeError as error:
                cannot = str(error)
                drops = f"no packets lost ({cannot})"
            leader = Generate(f"--workers={HOSTS * WORKERS_PER_HOST}", f"--cluster-address={BRIDGE_ADDRESS}:50052")
            proxy = SlowProxy(f"{BRIDGE_ADDRESS}:50052", 50053, DELAY_S)
            workers = []
            try:
                for rank in range(HOSTS * WORKERS_PER_HOST):
                    host = network.hosts[rank // WORKERS_PER_HOST]
                    workers.append(start_worker(host, rank, proxy.address))
                status, apart, said = leader.end()
                self.assertEqual(status, 0, said)
                if not cannot:
                    counts = [host.packets() for host in network.hosts]
                    came, lost = (sum(column) for column in zip(*counts))
                    self.assertGreater(lost, 0)
                    drops = f"{lost} of {came} packets lost"
                statuses = [worker.wait(30) for worker in workers]
            finally:
                for process in [leader.process, *workers]:
                    process.kill()
                    process.wait()
                proxy.close()
        self.assertEqual(len(apart), GOLDENS)
        for golden, one, many in zip(goldens(), alone, apart):
            self.assertEqual(one, many, golden["name"])
            self.assertEqual(golden["greedy"][:TOKENS], many, golden["name"])
        self.assertEqual(statuses, [0] * len(workers))
        print(f"{HOSTS} hosts x {WORKERS_PER_HOST} workers, 50 Mbit/s a link, {drops}, {1000 * DELAY_S:.0f} ms to the "
              f"leader: {TOKENS} tokens of {GOLDENS} goldens are one rank's; {said.count('is lost')} workers given up "
              f"on the way; {time.monotonic() - begin:.1f} s")

    def test_hosts_that_cannot_reach_each_other_are_named(self):
        with Network(2) as network:
            for host, other in [network.hosts, network.hosts[::-1]]:
                # To an address of the Ethernet that nobody has.
                host.run("ip", "neighbour", "add", other.address, "lladdr", "02:00:00:00:00:99", "dev", "eth0")
            address = f"{BRIDGE_ADDRESS}:50052"
            leader = Generate("--workers=2", "--cluster-address=" + address, "--start-timeout=20",
                              "--collective-timeout=1")
            workers = [start_worker(host, rank, address) for rank, host in enumerate(network.hosts)]
            try:
                status, _, said = leader.end()
                for worker in workers:
                    self.assertNotEqual(worker.wait(30), 0)
            finally:
                for process in [leader.process, *workers]:
                    process.kill()
                    process.wait()
        self.assertNotEqual(status, 0)
        self.assertRegex(said.splitlines()[-1], "rank 1 connects to rank 0: 10.99.0.1|"
                                                "rank 0 still waits for a connection from rank 1")


if __name__ == "__main__":
    for argument in [a for a in sys.argv[1:] if a.startswith(("--tokens=", "--goldens="))]:
        name, value = argument.removeprefix("--").split("=")
        globals()[name.upper()] = int(value)
    if not REASON:
        enter()
    unittest.main(argv=[a for a in sys.argv if "=" not in a], verbosity=2)
