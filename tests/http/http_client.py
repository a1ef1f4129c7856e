"""HTTP as bytes: what the tests of the HTTP port send and read, with no client library in between."""

import json
import socket


class Connection:
    """One TCP connection; answers are read one after another."""

    def __init__(self, address, timeout=30):
        host, port = address.rsplit(":", 1)
        self.socket = socket.create_connection((host, int(port)), timeout=timeout)
        self.buffer = b""

    def send(self, data):
        self.socket.sendall(data)

    def close(self):
        self.socket.close()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def _more(self):
        data = self.socket.recv(65536)
        self.buffer += data
        return bool(data)

    def line(self):
        while b"\r\n" not in self.buffer:
            if not self._more():
                raise EOFError(self.buffer)
        line, self.buffer = self.buffer.split(b"\r\n", 1)
        return line

    def exactly(self, count):
        while len(self.buffer) < count:
            if not self._more():
                raise EOFError(self.buffer)
        data, self.buffer = self.buffer[:count], self.buffer[count:]
        return data

    def at_end(self):
        """Waits for more; whether there is none and the server has closed."""
        try:
            return not self.buffer and not self._more()
        except ConnectionResetError:
            return not self.buffer

    def head(self):
        """(status, {lower-case name: value})"""
        status = self.line()
        version, code = status.split(b" ")[:2]
        assert version == b"HTTP/1.1", status
        headers = {}
        while line := self.line():
            name, value = line.decode("latin-1").split(":", 1)
            assert name.lower() not in headers or name.lower() == "vary", f"{name} twice"
            headers[name.lower()] = value.strip()
        return int(code), headers

    def chunk(self):
        """The next chunk's data; b"" for the last."""
        data = self.exactly(int(self.line(), 16))
        assert self.line() == b""
        return data

    def answer(self, head_only=False):
        """(status, headers, body)"""
        status, headers = self.head()
        if status == 100:
            return status, headers, b""
        body = b""
        if head_only or status == 204:
            pass
        elif headers.get("transfer-encoding") == "chunked":
            while chunk := self.chunk():
                body += chunk
        elif "content-length" in headers:
            body = self.exactly(int(headers["content-length"]))
        else:
            while self._more():
                pass
            body, self.buffer = self.buffer, b""
        return status, headers, body


def request_bytes(method, path, body=None, headers=()):
    """`body`: bytes, or anything else as JSON."""
    lines = [f"{method} {path} HTTP/1.1", "Host: test"]
    data = b""
    if body is not None:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        lines.append(f"Content-Length: {len(data)}")
        if not any(name.lower() == "content-type" for name, _ in headers):
            lines.append("Content-Type: application/json")
    lines += [f"{name}: {value}" for name, value in headers]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + data


def ask(address, method, path, body=None, headers=(), timeout=30):
    """One request on a connection of its own: (status, headers, body)."""
    with Connection(address, timeout) as connection:
        connection.send(request_bytes(method, path, body, [*headers, ("Connection", "close")]))
        return connection.answer(head_only=method == "HEAD")


def ask_json(address, method, path, body=None, headers=(), timeout=30):
    """(status, parsed body)"""
    status, _, data = ask(address, method, path, body, headers, timeout)
    return status, json.loads(data)


def events_of(data):
    """The events of a complete stream, parsed; it must end with [DONE]."""
    pieces = data.decode().split("\n\n")
    assert pieces[-1] == "" and pieces[-2] == "data: [DONE]", pieces[-2:]
    return [json.loads(piece.removeprefix("data: ")) for piece in pieces[:-2] if not piece.startswith(":")]


def is_error(body):
    """Whether it has OpenAI's shape of an error."""
    try:
        error = json.loads(body)["error"]
    except (ValueError, KeyError, TypeError):
        return False
    return (set(error) == {"message", "type", "param", "code"} and isinstance(error["message"], str)
            and error["message"] != "" and isinstance(error["type"], str)
            and all(error[name] is None or isinstance(error[name], str) for name in ("param", "code")))
