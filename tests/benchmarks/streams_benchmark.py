"""Output tokens/s of one gRPC stream and of 64 at once, for several numbers of ranks, in one run.

SOLOIST=bazel-bin/cli/soloist SOLOIST_MODEL=models/tiny .venv/bin/python tests/benchmarks/streams_benchmark.py [RANKS...]

Counted by the server (GetLoad) over the wall time that the client sees. The client shares the machine's cores with the
server: it drops what it receives without parsing it, but the sockets' work is in the figures.
"""

import pathlib
import sys
import threading
import time

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1] / "server"))
from soloist_client import Client, Server  # noqa: E402

STREAMS, TOKENS, ROUNDS = 64, 200, 5


def rate(client, request, streams):
    """Tokens/s of `streams` calls at once; `request`: a serialized GenerateRequest."""
    call = client.channel.unary_stream("/soloist.v1.InferenceService/Generate")

    def drain():
        for _ in call(request):
            pass

    before, start = client.control("GetLoad").generated_tokens, time.time()
    threads = [threading.Thread(target=drain) for _ in range(streams)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return (client.control("GetLoad").generated_tokens - before) / (time.time() - start)


def main():
    for ranks in [int(r) for r in sys.argv[1:]] or [1, 4, 16]:
        with Server(f"--ranks={ranks}") as server:
            client = Client(server.address)
            request = client.message("soloist.v1.GenerateRequest", text="Once upon a time", stop={"ignore_eos": True},
                                     sampling={"max_tokens": TOKENS, "temperature": 0}).SerializeToString()
            rate(client, request, 4)
            one = sorted(rate(client, request, 1) for _ in range(ROUNDS))[ROUNDS // 2]
            many = sorted(rate(client, request, STREAMS) for _ in range(ROUNDS))[ROUNDS // 2]
            client.close()
            print(f"{ranks:3d} ranks   1 stream {one:7.0f} tokens/s   {STREAMS} streams {many:7.0f} tokens/s   "
                  f"ratio {many / one:.2f}   (median of {ROUNDS})")


if __name__ == "__main__":
    main()
