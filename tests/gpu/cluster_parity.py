#!/usr/bin/env python3
"""Worker processes, one rank each, against one rank: the same prompts, every dispatch layout, on one device.

Each worker says that it is another host (NCCL_HOSTID), so that NCCL takes the way between nodes though all share a GPU.
Greedy tokens must be those of --ranks=1 on the same device; where they are not, the first difference must be a near tie:
the two tokens' log-probabilities in the one-rank run closer than --tie. Nothing but Python is needed:

  cluster_parity.py --soloist=./soloist --model=models/tiny --workers=2,4,8,16 [--device=cuda]

Prints a line for each run and, at the end, "N passed, N failed".
"""

import argparse
import json
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time

LAYOUTS = {
    "masked": [],
    "eager": ["--profile-every=1"],
    "contiguous": ["--masked-max-tokens=0"],
    "overflow": ["--dispatch-capacity=1"],
}


def prompts(vocab_size, count, longest, max_tokens):
    """Random token ids, lengths from 1 to `longest`: the same for every run."""
    rng = random.Random(7)
    lengths = [1 + (longest - 1) * i // max(1, count - 1) for i in range(count)]
    return [{"prompt_token_ids": [rng.randrange(vocab_size) for _ in range(n)], "max_tokens": max_tokens}
            for n in lengths]


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


class Runs:
    def __init__(self, flags):
        self.flags = flags
        self.shared = [f"--model={flags.model}", f"--load-format={flags.load_format}", f"--device={flags.device}",
                       f"--num-blocks={flags.num_blocks}", f"--max-model-len={flags.max_model_len}",
                       f"--max-tokens-per-step={flags.max_tokens_per_step}", f"--max-sequences={flags.max_sequences}"]
        self.asking = ["--temperature=0", "--ignore-eos", "--logprobs=5", "--json", f"--input={flags.input}"]

    def generate(self, *more, workers=0):
        """[request] dicts of token_ids and logprobs; or a text that says what went wrong."""
        command = [self.flags.soloist, "generate", *self.shared, *self.asking, *more]
        children, logs = [], []
        if workers:
            address = f"127.0.0.1:{free_port()}"
            command += [f"--workers={workers}", f"--cluster-address={address}", "--step-timeout=20", "--silence-timeout=10"]
            for rank in range(workers):
                log = tempfile.TemporaryFile("w+")
                logs.append(log)
                children.append(subprocess.Popen(
                    [self.flags.soloist, "worker", f"--leader={address}", f"--rank={rank}",
                     f"--device={self.flags.device}" + (":0" if self.flags.device == "cuda" else "")],
                    stdout=log, stderr=log,
                    env={**os.environ, "NCCL_HOSTID": f"r{rank}", "NCCL_SOCKET_IFNAME": "lo", "NCCL_NET": "Socket",
                         "NCCL_NVLS_ENABLE": "0", "NCCL_GRAPH_REGISTER": "0"}))
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=self.flags.limit)
            if done.returncode == 0:
                return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")], done.stderr
            problem = f"status {done.returncode}: {done.stderr[-1500:]}"
        except subprocess.TimeoutExpired as late:
            problem = f"not done after {self.flags.limit} s: {str(late.stderr or b'')[-1500:]}"
        finally:
            for child in children:
                if child.poll() is None:
                    child.send_signal(signal.SIGTERM)
            for child in children:
                try:
                    child.wait(10)
                except subprocess.TimeoutExpired:
                    child.kill()
                    child.wait()
        for rank, log in enumerate(logs):
            log.seek(0)
            last = log.read()[-300:].strip()
            if last and rank < 2:
                problem += f"\n  rank {rank}: {last}"
        return problem, ""


def compare(expected, actual, tie):
    """(number of equal requests, near ties, what differs otherwise)"""
    equal, ties, wrong = 0, [], []
    if len(expected) != len(actual):
        return 0, [], [f"{len(actual)} answers to {len(expected)} requests"]
    for r, (a, b) in enumerate(zip(expected, actual)):
        if a["token_ids"] == b["token_ids"]:
            equal += 1
            continue
        at = next((i for i, (x, y) in enumerate(zip(a["token_ids"], b["token_ids"])) if x != y), None)
        if at is None:
            wrong.append(f"request {r}: {len(b['token_ids'])} tokens instead of {len(a['token_ids'])}")
            continue
        top = {t["token"]: t["logprob"] for t in a["logprobs"][at]["top"]}
        gap = top[a["token_ids"][at]] - top[b["token_ids"][at]] if b["token_ids"][at] in top else float("inf")
        (ties if gap < tie else wrong).append(f"request {r}, token {at}: {gap:.4f} apart")
    return equal, ties, wrong


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--soloist", required=True)
    parser.add_argument("--model", required=True)
    parser.add_argument("--load-format", default="auto")
    parser.add_argument("--workers", default="2,4,8,16")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--layouts", default=",".join(LAYOUTS))
    parser.add_argument("--requests", type=int, default=24)
    parser.add_argument("--longest", type=int, default=150)
    parser.add_argument("--max-tokens", type=int, default=24)
    parser.add_argument("--num-blocks", type=int, default=128)
    parser.add_argument("--max-model-len", type=int, default=512)
    parser.add_argument("--max-tokens-per-step", type=int, default=256)
    parser.add_argument("--max-sequences", type=int, default=32)
    parser.add_argument("--tie", type=float, default=0.05, help="natural log")
    parser.add_argument("--limit", type=float, default=150, help="seconds for a run")
    flags = parser.parse_args()
    with open(os.path.join(flags.model, "config.json"), encoding="utf-8") as config:
        vocab_size = json.load(config)["vocab_size"]
    passed = failed = 0
    with tempfile.NamedTemporaryFile("w", suffix=".jsonl") as file:
        for prompt in prompts(vocab_size, flags.requests, flags.longest, flags.max_tokens):
            file.write(json.dumps(prompt) + "\n")
        file.flush()
        flags.input = file.name
        runs = Runs(flags)
        expected, _ = runs.generate("--ranks=1")
        if isinstance(expected, str):
            sys.exit(f"one rank: {expected}")
        for workers in (int(w) for w in flags.workers.split(",")):
            for layout in flags.layouts.split(","):
                start = time.monotonic()
                actual, log = runs.generate(*LAYOUTS[layout], workers=workers)
                took = f"{time.monotonic() - start:.1f} s"
                if isinstance(actual, str):
                    failed += 1
                    print(f"FAILED {workers} workers, {layout}, {took}: {actual}", flush=True)
                    continue
                equal, ties, wrong = compare(expected, actual, flags.tie)
                passed, failed = passed + (not wrong), failed + bool(wrong)
                print(f"{'FAILED' if wrong else 'passed'} {workers} workers, {layout}: {equal} of {len(expected)} requests "
                      f"equal, {len(ties)} near ties, {len(wrong)} wrong, {took}", flush=True)
                for text in ties + wrong[:5]:
                    print("    " + text)
                for line in log.splitlines():
                    if "transport" in line or "replay" in line:
                        print("    " + line[-160:])
    print(f"{passed} passed, {failed} failed")
    sys.exit(failed > 0 or passed == 0)


if __name__ == "__main__":
    main()
