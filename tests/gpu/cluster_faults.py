#!/usr/bin/env python3
"""Workers that are lost while they generate, on one device: the tokens must be those of an undisturbed run.

Each worker process is one rank and says that it is another host, as in cluster_parity.py. A worker gets SIGKILL, later
another SIGSTOP and then SIGKILL; each time a new process takes its place. With --deterministic on both sides tokens must
be equal; without, prompts and decodes are computed by different kernels on CUDA, so a sequence that started again may
part at a near tie (--tie). Nothing but Python is needed:

  cluster_faults.py --soloist=./soloist --model=models/tiny --workers=4 [--device=cuda] [--deterministic]

Prints what was recovered, how long each pause was, and "N passed, N failed".
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time

from cluster_parity import compare, free_port, prompts


class Cluster:
    """One `soloist generate` with its workers."""

    def __init__(self, flags, requests):
        self.flags = flags
        address = f"127.0.0.1:{free_port()}"
        both = ["--deterministic"] if flags.deterministic else []
        self.worker_command = [flags.soloist, "worker", f"--leader={address}", *both]
        self.device = f"--device={flags.device}" + (":0" if flags.device == "cuda" else "")
        self.log = tempfile.TemporaryFile("w+")
        self.output = tempfile.TemporaryFile("w+")
        self.leader = subprocess.Popen(
            [flags.soloist, "generate", f"--model={flags.model}", f"--device={flags.device}", *both,
             f"--workers={flags.workers}", f"--cluster-address={address}", f"--num-blocks={flags.num_blocks}",
             "--temperature=0", "--ignore-eos", "--logprobs=5", "--json", f"--input={requests}"],
            stdout=self.output, stderr=self.log)
        self.workers = [self.start(rank) for rank in range(flags.workers)]

    def start(self, rank):
        return subprocess.Popen(
            [*self.worker_command, f"--rank={rank}", self.device], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            env={**os.environ, "NCCL_HOSTID": f"r{rank}", "NCCL_SOCKET_IFNAME": "lo", "NCCL_NET": "Socket",
                 "NCCL_NVLS_ENABLE": "0", "NCCL_GRAPH_REGISTER": "0"})

    def logged(self):
        self.log.seek(0)
        return self.log.read()

    def wait_for(self, text, count):
        """Until the leader has logged `text` so often; False if it ends before, or at the limit."""
        end = time.monotonic() + self.flags.limit
        while self.logged().count(text) < count:
            if self.leader.poll() is not None or time.monotonic() > end:
                return False
            time.sleep(0.05)
        return True

    def lose(self, rank, stop):
        worker = self.workers[rank]
        if stop:
            worker.send_signal(signal.SIGSTOP)
            time.sleep(4)
        worker.kill()
        worker.wait()
        self.workers[rank] = self.start(rank)

    def answers(self):
        """[request] dicts of token_ids and logprobs, or None."""
        try:
            status = self.leader.wait(self.flags.limit)
        except subprocess.TimeoutExpired:
            status = None
        for process in [self.leader, *self.workers]:
            if process.poll() is None:
                process.kill()
                process.wait()
        self.output.seek(0)
        return [json.loads(line) for line in self.output if line.startswith("{")] if status == 0 else None


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--soloist", required=True)
    parser.add_argument("--model", required=True)
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--deterministic", action="store_true")
    parser.add_argument("--requests", type=int, default=12)
    parser.add_argument("--longest", type=int, default=100)
    parser.add_argument("--max-tokens", type=int, default=300)
    parser.add_argument("--num-blocks", type=int, default=256)
    parser.add_argument("--faults", type=int, default=3, help="the second and every other one by SIGSTOP")
    parser.add_argument("--apart", type=float, default=3, help="seconds from a recovery to the next fault")
    parser.add_argument("--seed", type=int, default=1, help="of the choice of ranks")
    parser.add_argument("--tie", type=float, default=0.05, help="natural log; 0 with --deterministic")
    parser.add_argument("--limit", type=float, default=120, help="seconds for a run")
    flags = parser.parse_args()
    with open(os.path.join(flags.model, "config.json"), encoding="utf-8") as config:
        vocab_size = json.load(config)["vocab_size"]
    rng = random.Random(flags.seed)
    with tempfile.NamedTemporaryFile("w", suffix=".jsonl") as file:
        for prompt in prompts(vocab_size, flags.requests, flags.longest, flags.max_tokens):
            file.write(json.dumps(prompt) + "\n")
        file.flush()
        expected = Cluster(flags, file.name).answers()
        if expected is None:
            sys.exit("the undisturbed run failed")
        cluster = Cluster(flags, file.name)
        faults = 0
        if cluster.wait_for("form group 1 ", 1):
            while faults < flags.faults:
                time.sleep(flags.apart)
                if cluster.leader.poll() is not None:
                    break
                cluster.lose(rng.randrange(flags.workers), stop=faults % 2 == 1)
                faults += 1
                if not cluster.wait_for("recovered after", faults):
                    break
        actual = cluster.answers()
    log = cluster.logged()
    for line in log.splitlines():
        if "recovered after" in line:
            print(line)
    if actual is None:
        sys.exit(f"FAILED: no answers. {log[-1500:]}")
    equal, ties, wrong = compare(expected, actual, 0 if flags.deterministic else flags.tie)
    for text in ties + wrong:
        print("    " + text)
    failed = bool(wrong) or faults < flags.faults
    print(f"{faults} faults: {equal} of {len(expected)} requests equal, {len(ties)} near ties, {len(wrong)} wrong")
    print(f"{int(not failed)} passed, {int(failed)} failed")
    sys.exit(failed)


if __name__ == "__main__":
    main()
