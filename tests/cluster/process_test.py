"""A leader and worker processes on this machine: the goldens, lost workers under load, wrong set-ups.

    run.sh process_test.py [--rounds=N]     N losses of a worker under load (default 4)
"""

import contextlib
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import unittest

sys.path.insert(0, os.environ["SOLOIST_CLIENT_DIR"])
from soloist_client import Server, client_of, tokens_of  # noqa: E402

SOLOIST, MODEL = os.environ["SOLOIST"], os.environ["SOLOIST_MODEL"]
ROUNDS = 4
STREAMS = 16


def children_of(pid):
    out = subprocess.run(["pgrep", "-P", str(pid)], capture_output=True, text=True, check=False).stdout
    return [int(line) for line in out.split()]


def run_batch(lines, *flags):
    with tempfile.NamedTemporaryFile("w", suffix=".jsonl") as file:
        file.write("".join(json.dumps(line) + "\n" for line in lines))
        file.flush()
        out = subprocess.run([SOLOIST, "generate", "--model=" + MODEL, "--json", "--temperature=0", "--ignore-eos",
                              "--input=" + file.name, *flags], capture_output=True, text=True, timeout=240, check=False)
    if out.returncode != 0:
        raise RuntimeError(out.stderr)
    return [json.loads(line) for line in out.stdout.splitlines()]


class GoldenTest(unittest.TestCase):
    def test_sixteen_workers_equal_one_rank(self):
        with open(os.path.join(MODEL, "golden", "prompts.jsonl"), encoding="utf-8") as file:
            goldens = [json.loads(line) for line in file]
        lines = [{"prompt_token_ids": g["ids"], "max_tokens": 12} for g in goldens]
        flags = ["--return-logits", "--max-tokens=12"]
        alone = run_batch(lines, *flags)
        cluster = run_batch(lines, *flags, "--workers=16", "--spawn=local")
        self.assertEqual(len(cluster), len(goldens))
        differ = 0
        for golden, one, many in zip(goldens, alone, cluster):
            self.assertEqual(one["token_ids"], many["token_ids"], golden["name"])
            self.assertEqual(one["logits"], many["logits"], golden["name"])
            differ += golden["greedy"][:12] != many["token_ids"]
        print(f"{len(goldens)} goldens, 12 tokens each: tokens and logits of 16 workers are one rank's, bit for bit; "
              f"{differ} differ from transformers'")
        self.assertEqual(differ, 0)


class LossTest(unittest.TestCase):
    def test_requests_survive_lost_workers(self):
        requests = [{"text": f"Once upon a time, number {i}",
                     "sampling": {"max_tokens": 120, "ignore_eos": True, "temperature": 0.8 * (i % 2), "seed": i}}
                    for i in range(STREAMS)]
        with Server("--workers=4", "--spawn=local") as server, client_of(server) as client:
            requests = [self.known(client, r) for r in requests]
            expected = [tokens_of(list(client.generate(**r))) for r in requests]
            self.assertTrue(all(len(tokens) > 1 for tokens in expected))
            pauses = []
            for round_number in range(ROUNDS):
                pauses.append(self.lose_one(server, client, requests, expected, round_number))
        print(f"{ROUNDS} losses under {STREAMS} streams, 0 failed, 0 wrong; longest wait for a token: median "
              f"{statistics.median(pauses):.2f} s, most {max(pauses):.2f} s")
        self.assertLess(max(pauses), 30)

    @staticmethod
    def known(client, request):
        """Without the fields that SamplingParams has elsewhere."""
        fields = client.pool.FindMessageTypeByName("soloist.v1.SamplingParams").fields_by_name
        top = client.pool.FindMessageTypeByName("soloist.v1.GenerateRequest").fields_by_name
        sampling = {k: v for k, v in request["sampling"].items() if k in fields}
        rest = {k: v for k, v in request["sampling"].items() if k in top}
        return {**request, "sampling": sampling, **rest}

    def lose_one(self, server, client, requests, expected, round_number):
        times, results, errors = [], {}, []

        def stream(i):
            events = []
            try:
                for event in client.generate(**requests[i]):
                    times.append(time.monotonic())
                    events.append(event)
                results[i] = tokens_of(events)
            except Exception as error:  # noqa: BLE001  # whatever it is, the test must say so
                errors.append(f"stream {i}: {error}")

        threads = [threading.Thread(target=stream, args=(i,)) for i in range(len(requests))]
        for thread in threads:
            thread.start()
        time.sleep(random.uniform(0.1, 0.6))
        victim = random.choice(children_of(server.process.pid))
        how = [signal.SIGKILL, signal.SIGSTOP][round_number % 2]
        os.kill(victim, how)
        for thread in threads:
            thread.join(120)
        self.assertEqual(errors, [], f"round {round_number}, {how.name}")
        for i, tokens in enumerate(expected):
            self.assertEqual(results[i], tokens, f"round {round_number}, {how.name}, stream {i}")
        times.sort()
        return max(b - a for a, b in zip(times, times[1:]))


class RefusalTest(unittest.TestCase):
    """Set-ups that cannot work: each ends by itself, soon, with a sentence that says why."""

    def leader(self, *flags, workers=(), timeout=60):
        """The leader's status and messages; workers: flags of each, %s stands for the leader's address."""
        with tempfile.NamedTemporaryFile("w") as errors, open(errors.name, encoding="utf-8") as log:
            process = subprocess.Popen([SOLOIST, "generate", "--model=" + MODEL, "--prompt=Once", "--max-tokens=4",
                                        *flags], stdout=subprocess.DEVNULL, stderr=errors)
            started = []
            try:
                address = ""
                deadline = time.time() + 20
                while workers and not address and time.time() < deadline:
                    for line in log.readlines():
                        if " workers at " in line:
                            address = line.split(" workers at ")[1].split()[0]
                    time.sleep(0.05)
                for worker in workers:
                    if not any(flag.startswith("--comm-address") for flag in worker):
                        worker = [*worker, "--comm-address=127.0.0.1"]
                    started.append(subprocess.Popen([SOLOIST, "worker", "--leader=" + address, "--leader-timeout=2",
                                                     *worker],
                                                    stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True))
                status = process.wait(timeout)
                said = [w.communicate(timeout=30)[0] for w in started]
            finally:
                for p in [process, *started]:
                    p.kill()
            log.seek(0)
            return status, log.read(), said

    def check(self, result, *words):
        status, said, workers = result
        self.assertNotEqual(status, 0)
        everything = said + "".join(workers)
        for word in words:
            self.assertIn(word, everything)

    ANY = "--cluster-address=127.0.0.1:0"

    def test_missing_rank(self):
        self.check(self.leader("--workers=2", self.ANY, "--start-timeout=4", workers=[["--rank=0"]]), "rank 1")

    def test_two_workers_want_one_rank(self):
        self.check(self.leader("--workers=2", self.ANY, "--start-timeout=4", workers=[["--rank=0"], ["--rank=0"]]),
                   "rank 0")

    def test_rank_out_of_range(self):
        self.check(self.leader("--workers=2", self.ANY, "--start-timeout=4", workers=[["--rank=5"]]), "5")

    def test_no_such_model_on_the_worker(self):
        self.check(self.leader("--workers=1", self.ANY, "--start-timeout=4", workers=[["--model=/nowhere"]]),
                   "/nowhere")

    @contextlib.contextmanager
    def changed_model(self, file_name, change):
        """A folder with the bundled model, but that file's bytes as `change` makes them."""
        with tempfile.TemporaryDirectory() as folder:
            for name in os.listdir(MODEL):
                source = os.path.realpath(os.path.join(MODEL, name))
                if os.path.isfile(source) and name != file_name:
                    os.symlink(source, os.path.join(folder, name))
            with open(os.path.join(MODEL, file_name), "rb") as file:
                data = change(file.read())
            with open(os.path.join(folder, file_name), "wb") as file:
                file.write(data)
            yield folder

    def test_another_config(self):
        with self.changed_model("config.json", lambda data: data.replace(b"1e-05", b"1e-03")) as folder:
            self.check(self.leader("--workers=1", self.ANY, "--start-timeout=6", workers=[["--model=" + folder]]),
                       "rank 0", "another config.json")

    def test_another_checkpoint(self):
        def pad(data):  # blanks behind the header: the same tensors in other bytes
            size = int.from_bytes(data[:8], "little")
            return (size + 8).to_bytes(8, "little") + data[8:8 + size] + b" " * 8 + data[8 + size:]

        with self.changed_model("model-00002-of-00002.safetensors", pad) as folder:
            self.check(self.leader("--workers=1", self.ANY, "--start-timeout=6", workers=[["--model=" + folder]]),
                       "rank 0", "another checkpoint")

    def test_address_that_peers_cannot_reach(self):
        result = self.leader("--workers=2", self.ANY, "--start-timeout=15", "--collective-timeout=1",
                             workers=[["--rank=0", "--comm-address=192.0.2.77"], ["--rank=1"]])
        self.check(result, "rank 0")
        self.assertRegex(result[1], "rank 1 connects to rank 0: 192.0.2.77|still waits for a connection from rank 1")

    def test_ports_out_of_range(self):
        worker = subprocess.run([SOLOIST, "worker", "--leader=127.0.0.1:9", "--comm-ports=70000-70001"],
                                capture_output=True, text=True, timeout=30, check=False)
        self.assertNotEqual(worker.returncode, 0)
        self.assertIn("--comm-ports is '70000-70001', allowed: 1 to 65535", worker.stderr)

    def test_too_few_ports(self):
        one = "--comm-ports=50978-50978"
        self.check(self.leader("--workers=2", self.ANY, "--start-timeout=15",
                               workers=[["--rank=0", one], ["--rank=1", one]]),
                   "no port of 50978 to 50978 on 127.0.0.1 can be listened on", "rank ")

    def test_transport_too_slow(self):
        self.check(self.leader("--workers=2", "--spawn=local", "--require-transport=nvlink", "--start-timeout=15"),
                   "nvlink")

    def test_too_many_blocks(self):
        self.check(self.leader("--workers=2", "--spawn=local", "--num-blocks=2000000000", "--start-timeout=15"),
                   "2000000000")

    def test_more_workers_than_experts(self):
        self.check(self.leader("--workers=17", "--spawn=local"), "17", "16")

    def test_address_in_use(self):
        with Server("--workers=1", "--spawn=local", "--cluster-address=127.0.0.1:50977"):
            self.check(self.leader("--workers=1", "--spawn=local", "--cluster-address=127.0.0.1:50977"), "50977")

    def test_no_leader(self):
        worker = subprocess.run([SOLOIST, "worker", "--leader=127.0.0.1:9", "--leader-timeout=1"], capture_output=True,
                                text=True, timeout=30, check=False)
        self.assertEqual(worker.returncode, 3)
        self.assertIn("127.0.0.1:9", worker.stdout + worker.stderr)


if __name__ == "__main__":
    for argument in [a for a in sys.argv[1:] if a.startswith("--rounds=")]:
        ROUNDS = int(argument.split("=")[1])
        sys.argv.remove(argument)
    unittest.main(verbosity=2)
