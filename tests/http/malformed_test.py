"""Every request of malformed.py gets its 4xx in OpenAI's shape, and the server goes on as if nothing had been."""

import json
import unittest

import malformed
from http_client import Connection, ask, is_error, request_bytes
from soloist_client import Client, Server


class MalformedTest(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.server = Server("--ranks=1", "--http-address=127.0.0.1:0")
        cls.http = cls.server.http_address

    @classmethod
    def tearDownClass(cls):
        cls.server.__exit__()

    def check(self, data, status, named=""):
        with Connection(self.http) as connection:
            connection.send(data)
            got, headers, body = connection.answer()
        self.assertEqual(got, status, body[:300])
        self.assertTrue(is_error(body), body[:300])
        self.assertEqual(headers["content-type"], "application/json")
        self.assertIn(named, json.loads(body)["error"]["message"])

    def test_table(self):
        cases = [(raw, status, "") for raw, status in malformed.RAW]
        cases += [(malformed.post(text), 400, "") for text in malformed.TEXT]
        cases += [(request_bytes("POST", "/v1/completions", {"prompt": "a", "max_tokens": 4, **fields}), 400, named)
                  for fields, named in malformed.FIELDS]
        cases += [(request_bytes("POST", path, body), 400, named) for path, body, named in malformed.BODIES]
        self.assertGreaterEqual(len(cases), 200)
        for data, status, named in cases:
            with self.subTest(data[:300]):
                self.check(data, status, named)
        # It lives, holds nothing, and answers.
        client = Client(self.server.address)
        load = client.control("GetLoad")
        client.close()
        self.assertEqual((load.running_requests, load.waiting_requests, load.open_streams), (0, 0, 0))
        self.assertEqual(ask(self.http, "POST", "/v1/completions", {"prompt": "a"})[0], 200)

    def test_param_names_the_field(self):
        for fields, param in [({"top_p": 2}, "top_p"), ({"n": "x"}, "n"), ({"suffix": "x"}, "suffix"), ({"model": "x"}, "model"),
                              ({"stop": [""]}, "stop"), ({"max_tokens": 0}, "max_tokens")]:
            _, _, body = ask(self.http, "POST", "/v1/completions", {"prompt": "a", **fields})
            self.assertEqual(json.loads(body)["error"]["param"], param)


if __name__ == "__main__":
    unittest.main(verbosity=2)
