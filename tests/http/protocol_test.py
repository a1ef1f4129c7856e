"""HTTP/1.1 as it is on the wire: keep-alive, pipelining, chunks, HEAD, what is cut off and when, heartbeats, who goes
away, who is too slow, the end of the server."""

import json
import socket
import threading
import time
import unittest

from http_client import Connection, ask, ask_json, events_of, is_error, request_bytes
from soloist_client import Client, Server

PROMPT = "Once upon a time"
LONG = {"prompt": PROMPT, "max_tokens": 1900, "ignore_eos": True, "stream": True}
HEALTH = request_bytes("GET", "/health")


def wait_for(condition, what, seconds=20):
    deadline = time.time() + seconds
    while not condition():
        if time.time() > deadline:
            raise AssertionError(f"not within {seconds} s: {what}")
        time.sleep(0.01)


class ProtocolTest(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        # One sequence at a time, so that a second request waits for the first.
        cls.server = Server("--ranks=1", "--http-address=127.0.0.1:0", "--http-header-timeout=0.5", "--http-heartbeat=0.2",
                            "--max-sequences=1", "--max-queue=2", "--http-max-connections=24")
        cls.client = Client(cls.server.address)
        cls.http = cls.server.http_address

    @classmethod
    def tearDownClass(cls):
        cls.client.close()
        cls.server.__exit__()

    def tearDown(self):
        wait_for(self.idle, "all requests have ended")

    def idle(self):
        load = self.client.control("GetLoad")
        return load.running_requests == load.waiting_requests == load.open_streams == 0

    def start_long(self, **fields):
        """A stream that has begun."""
        connection = Connection(self.http)
        self.addCleanup(connection.close)
        connection.send(request_bytes("POST", "/v1/completions", {**LONG, **fields}))
        self.assertEqual(connection.head()[0], 200)
        connection.chunk()
        return connection

    def test_keep_alive_and_pipelining(self):
        with Connection(self.http) as connection:
            for _ in range(3):
                connection.send(HEALTH)
                status, headers, body = connection.answer()
                self.assertEqual((status, json.loads(body)), (200, {"status": "ready"}))
                self.assertNotIn("connection", headers)
            short = {"prompt": PROMPT, "max_tokens": 3, "temperature": 0}
            connection.send(HEALTH + request_bytes("POST", "/v1/completions", {**short, "stream": True}) +
                            request_bytes("HEAD", "/version") + request_bytes("POST", "/v1/completions", short) +
                            request_bytes("GET", "/nothing") + HEALTH)
            self.assertEqual(connection.answer()[0], 200)
            streamed = "".join(e["choices"][0]["text"] for e in events_of(connection.answer()[2]))
            status, headers, body = connection.answer(head_only=True)
            self.assertEqual((status, body, headers["content-length"] != "0"), (200, b"", True))
            self.assertEqual(json.loads(connection.answer()[2])["choices"][0]["text"], streamed)
            self.assertEqual([connection.answer()[0] for _ in range(2)], [404, 200])

    def test_requests_that_come_while_another_is_answered(self):
        with Connection(self.http) as connection:
            for _ in range(2):
                connection.send(request_bytes("POST", "/v1/completions", {**LONG, "max_tokens": 100}))
                status, _ = connection.head()
                self.assertEqual(status, 200)
                connection.chunk()
                connection.send(request_bytes("GET", "/version") + HEALTH)
                while connection.chunk():
                    pass
                self.assertIn("version", json.loads(connection.answer()[2]))
                self.assertEqual(json.loads(connection.answer()[2]), {"status": "ready"})
                connection.send(request_bytes("GET", "/v1/models"))
                self.assertEqual(json.loads(connection.answer()[2])["object"], "list")

    def test_byte_by_byte_and_chunked(self):
        body = json.dumps({"prompt": PROMPT, "max_tokens": 2, "temperature": 0}).encode()
        head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        whole = head + b"Content-Length: %d\r\n\r\n" % len(body) + body
        chunked = head + b"Transfer-Encoding: chunked\r\n\r\n" + b"".join(
            b"%x;note=1\r\n%s\r\n" % (len(body[i:i + 7]), body[i:i + 7]) for i in range(0, len(body), 7)) + \
            b"0\r\nTrailer: x\r\n\r\n"
        texts = set()
        with Connection(self.http) as connection:
            connection.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            for data in (whole, chunked):
                for i in range(len(data)):
                    connection.send(data[i:i + 1])
                texts.add(json.loads(connection.answer()[2])["choices"][0]["text"])
                connection.send(data)
                texts.add(json.loads(connection.answer()[2])["choices"][0]["text"])
        self.assertEqual(len(texts), 1)

    def test_continue(self):
        body = json.dumps({"prompt": PROMPT, "max_tokens": 1}).encode()
        with Connection(self.http) as connection:
            connection.send(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
                            b"Expect: 100-continue\r\nContent-Length: %d\r\n\r\n" % len(body))
            self.assertEqual(connection.head()[0], 100)
            connection.send(body)
            self.assertEqual(connection.answer()[0], 200)

    def test_http_1_0(self):
        with Connection(self.http) as connection:
            connection.send(b"GET /health HTTP/1.0\r\n\r\n")
            status, headers, _ = connection.answer()
            self.assertEqual((status, headers["connection"]), (200, "close"))
            self.assertTrue(connection.at_end())
        body = json.dumps({"prompt": PROMPT, "max_tokens": 3, "stream": True}).encode()
        with Connection(self.http) as connection:
            connection.send(b"POST /v1/completions HTTP/1.0\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n" %
                            len(body) + body)
            status, headers, data = connection.answer()
            self.assertEqual((status, "transfer-encoding" in headers), (200, False))
            self.assertGreaterEqual(len(events_of(data)), 2)

    def test_connection_close(self):
        with Connection(self.http) as connection:
            connection.send(request_bytes("GET", "/health", headers=[("Connection", "close")]))
            self.assertEqual(connection.answer()[1]["connection"], "close")
            self.assertTrue(connection.at_end())

    def test_slow_headers_and_bodies_are_cut_off(self):
        def run(name, data):
            with Connection(self.http) as connection:
                began = time.time()
                try:
                    for i in range(200):
                        connection.send(data[i:i + 1])
                        time.sleep(0.05)  # slow, and still moving
                        connection.socket.setblocking(False)
                        try:
                            if connection.socket.recv(1, socket.MSG_PEEK):
                                break
                        except BlockingIOError:
                            pass
                        finally:
                            connection.socket.settimeout(30)
                except (BrokenPipeError, ConnectionResetError):
                    pass
                status, headers, body = connection.answer()
                results[name] = (status, headers["connection"], is_error(body), time.time() - began < 8)

        results = {}
        header = b"GET /health HTTP/1.1\r\nHost: x\r\n" + b"X: y\r\n" * 100
        body = b"POST /tokenize HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 1000\r\n\r\n"
        threads = [threading.Thread(target=run, args=("header", header)),
                   threading.Thread(target=run, args=("nonsense", b"{" * 500))]
        for thread in threads:
            thread.start()
        with Connection(self.http) as connection:  # the header at once, nothing of the body
            connection.send(body)
            self.assertEqual(connection.answer()[0], 408)
            self.assertTrue(connection.at_end())
        with Connection(self.http) as connection:  # not a byte
            self.assertTrue(connection.at_end())
        for thread in threads:
            thread.join()
        self.assertEqual(results, {"header": (408, "close", True, True), "nonsense": (400, "close", True, True)})

    def test_large_body(self):
        prompt = "word " * 1000
        status, answer = ask_json(self.http, "POST", "/tokenize", {"prompt": prompt, "padding": "x" * (7 << 20)})
        self.assertEqual((status, answer["count"]), (200, ask_json(self.http, "POST", "/tokenize", {"prompt": prompt})[1]["count"]))
        status, headers, body = ask(self.http, "POST", "/tokenize", {"prompt": "x" * (9 << 20)})
        self.assertEqual((status, headers["connection"], is_error(body)), (413, "close", True))

    def test_disconnect_cancels(self):
        before = self.client.control("GetLoad").generated_tokens
        self.start_long().close()
        wait_for(self.idle, "the cancelled request has ended")
        with Connection(self.http) as connection:  # not streamed: nothing is written that could fail
            connection.send(request_bytes("POST", "/v1/completions", {**LONG, "stream": False, "n": 1}))
            wait_for(lambda: self.client.control("GetLoad").running_requests == 1, "it runs")
        wait_for(self.idle, "the cancelled request has ended")
        self.assertLess(self.client.control("GetLoad").generated_tokens - before, 2 * 1900)

    def test_queue_and_heartbeats(self):
        first = self.start_long()
        waiting = []
        for _ in range(2):
            connection = Connection(self.http)
            self.addCleanup(connection.close)
            connection.send(request_bytes("POST", "/v1/completions", {**LONG, "max_tokens": 2}))
            waiting.append(connection)
        wait_for(lambda: self.client.control("GetLoad").waiting_requests == 2, "two wait")
        status, headers, body = ask(self.http, "POST", "/v1/completions", LONG)
        self.assertEqual((status, is_error(body)), (429, True))
        self.assertGreaterEqual(int(headers["retry-after"]), 1)
        status, headers = waiting[0].head()
        self.assertEqual((status, headers["content-type"].split(";")[0]), (200, "text/event-stream"))
        for _ in range(2):
            self.assertEqual(waiting[0].chunk(), b": ping\n\n")
        first.close()
        data = b""
        while chunk := waiting[0].chunk():
            data += chunk
        self.assertEqual(sum(bool(e["choices"][0]["finish_reason"]) for e in events_of(data)), 1)
        self.assertEqual(waiting[1].answer()[0], 200)

    def test_too_many_connections(self):
        held = [Connection(self.http) for _ in range(24)]
        try:
            status, headers, body = ask(self.http, "GET", "/health")
            self.assertEqual((status, is_error(body), "retry-after" in headers), (503, True, True))
        finally:
            for connection in held:
                connection.close()
        wait_for(lambda: ask(self.http, "GET", "/health")[0] == 200, "connections are free again")

    def test_error_after_the_stream_has_begun(self):
        connection = self.start_long(request_id="to-be-aborted")
        self.client.call("soloist.v1.InferenceService", "Abort", request_id="cmpl-to-be-aborted")
        data = b""
        while chunk := connection.chunk():
            data += chunk
        self.assertEqual(events_of(data)[-1]["choices"][0]["finish_reason"], "abort")


class LifeTest(unittest.TestCase):
    def test_slow_reader_is_told(self):
        flags = ("--ranks=1", "--http-address=127.0.0.1:0", "--max-buffered-tokens=64")
        with Server(*flags) as server, Connection(server.http_address) as connection:
            connection.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            connection.send(request_bytes("POST", "/v1/completions",
                                          {**LONG, "n": 16, "logprobs": 20, "return_token_ids": True}))
            client = Client(server.address)
            wait_for(lambda: client.control("GetLoad").generated_tokens > 0, "it runs")
            wait_for(lambda: client.control("GetLoad").running_requests == 0, "the reader is too slow")
            self.assertLess(client.control("GetLoad").generated_tokens, 16 * 1900)
            client.close()
            events = events_of(connection.answer()[2])
            self.assertIn("too slow", events[-1]["error"]["message"])

    def test_drain(self):
        with Server("--ranks=1", "--http-address=127.0.0.1:0") as server:
            running, idle = Connection(server.http_address), Connection(server.http_address)
            running.send(request_bytes("POST", "/v1/completions", {**LONG, "max_tokens": 900}))
            self.assertEqual(running.head()[0], 200)
            first = running.chunk()
            idle.send(HEALTH)
            idle.answer()
            server.process.terminate()
            wait_for(lambda: ask(server.http_address, "GET", "/health")[0] == 503, "it drains")
            status, headers, body = ask(server.http_address, "POST", "/v1/completions", {"prompt": PROMPT})
            self.assertEqual((status, "retry-after" in headers, is_error(body)), (503, True, True))
            data = first
            while chunk := running.chunk():
                data += chunk
            self.assertEqual(events_of(data)[-1]["choices"][0]["finish_reason"], "length")
            self.assertEqual(server.process.wait(30), 0)
            self.assertTrue(idle.at_end())
            running.close()
            idle.close()

    def test_second_signal_resets(self):
        with Server("--ranks=1", "--http-address=127.0.0.1:0") as server, Connection(server.http_address) as connection:
            connection.send(request_bytes("POST", "/v1/completions", {**LONG, "n": 16}))
            self.assertEqual(connection.head()[0], 200)
            server.process.terminate()
            wait_for(lambda: any("draining" in line for line in server.lines), "it drains")
            server.process.terminate()
            self.assertEqual(server.process.wait(30), 0)


if __name__ == "__main__":
    unittest.main(verbosity=2)
