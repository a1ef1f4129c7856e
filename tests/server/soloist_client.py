"""A soloist server as a child process, and a client that knows nothing of it but what server reflection tells."""

import contextlib
import os
import signal
import subprocess
import threading

import grpc
from google.protobuf import descriptor_pool, message_factory
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase


class Client:
    """Calls any method of any service that the server lists, with messages made from the reflected descriptors."""

    def __init__(self, address, options=()):
        self.channel = grpc.insecure_channel(address, options=list(options))
        self.database = ProtoReflectionDescriptorDatabase(self.channel)
        self.pool = descriptor_pool.DescriptorPool(self.database)

    def services(self):
        return sorted(self.database.get_services())

    def message(self, name, **fields):
        return message_factory.GetMessageClass(self.pool.FindMessageTypeByName(name))(**fields)

    def _method(self, service, method):
        descriptor = self.pool.FindServiceByName(service).FindMethodByName(method)
        reply = message_factory.GetMessageClass(descriptor.output_type)
        make = self.channel.unary_stream if descriptor.server_streaming else self.channel.unary_unary
        call = make(f"/{service}/{method}", request_serializer=lambda m: m.SerializeToString(),
                    response_deserializer=reply.FromString)
        return call, descriptor.input_type.full_name

    def call(self, service, method, timeout=60, request=None, metadata=(), **fields):
        call, input_name = self._method(service, method)
        return call(request if request is not None else self.message(input_name, **fields), timeout=timeout,
                    metadata=metadata)

    def control(self, method, **fields):
        return self.call("soloist.v1.ControlService", method, **fields)

    def generate(self, timeout=60, **fields):
        return self.call("soloist.v1.InferenceService", "Generate", timeout=timeout, **fields)

    def close(self):
        self.channel.close()


class Server:
    """`soloist serve` as a child, by default on a free port of the loopback interface."""

    def __init__(self, *flags, address="127.0.0.1:0", wait_ready=True):
        self.lines = []
        self.process = subprocess.Popen(
            [os.environ["SOLOIST"], "serve", f"--grpc-address={address}",
             "--model=" + os.environ["SOLOIST_MODEL"], *flags],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        line = self.process.stdout.readline()
        if not line.startswith("listening on "):
            errors = self.process.communicate()[1]
            raise RuntimeError(f"server said {line!r}: {errors}")
        self.address = line.split()[-1]
        self.http_address = None
        if any(flag.startswith("--http-") for flag in flags):
            self.http_address = self.process.stdout.readline().split()[-1]
        self.ready = threading.Event()
        self.reader = threading.Thread(target=self._read, daemon=True)
        self.reader.start()
        if wait_ready and not self.ready.wait(120):
            raise RuntimeError("not ready after 120 s: " + "".join(self.lines))

    def _read(self):
        for line in self.process.stderr:
            self.lines.append(line)
            if " ready: " in line:
                self.ready.set()

    def resident_bytes(self):
        with open(f"/proc/{self.process.pid}/statm", encoding="ascii") as statm:
            return int(statm.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    def terminate(self, timeout=60):
        """SIGTERM; the exit status."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(timeout)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        self.reader.join()
        self.process.stdout.close()
        self.process.stderr.close()


def text_of(events, index=0):
    return "".join(e.delta.text for e in events if e.HasField("delta") and e.delta.output_index == index)


def tokens_of(events, index=0):
    return [t for e in events if e.HasField("delta") and e.delta.output_index == index for t in e.delta.token_ids]


@contextlib.contextmanager
def client_of(server, **options):
    client = Client(server.address, **options)
    try:
        yield client
    finally:
        client.close()
