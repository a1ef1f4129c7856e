"""Network namespaces as the hosts of a small network, and a proxy that makes a TCP connection slow.

    netns.py        says whether namespaces may be made here

`enter()` moves the calling program into a network namespace of its own, in which a Network's bridge is made. A host is
a namespace without a name, which a child holds: the kernel removes all of it when the last process in it has ended,
however that ends. Nothing outside is touched, and several may run at once.
"""

import asyncio
import json
import os
import signal
import subprocess
import sys
import threading

INSIDE = "SOLOIST_NETNS"
# Where `ip` and `tc` are; Bazel's PATH has no such folder.
os.environ["PATH"] += ":/usr/sbin:/sbin"
BRIDGE_ADDRESS = "10.99.0.254"


def unshare():
    """The command that runs another one in a new network namespace."""
    return ["unshare", "--net"] if os.geteuid() == 0 else ["unshare", "--user", "--map-root-user", "--net"]


def run(*command):
    """What it prints; RuntimeError if it fails."""
    out = subprocess.run(command, capture_output=True, text=True, check=False)
    if out.returncode != 0:
        raise RuntimeError(f"{' '.join(command)}: {out.stderr.strip()}")
    return out.stdout


def why_not(*also):
    """Why no namespaces can be made here, or these commands fail in one; empty if all is well."""
    trial = ("ip link add br0 type bridge && ip link add a0 type veth peer name b0 && "
             "tc qdisc add dev a0 root tbf rate 50mbit burst 64kb latency 1s")
    trial = " && ".join([trial, *also])
    try:
        out = subprocess.run([*unshare(), "sh", "-c", trial], capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return str(error)
    return "" if out.returncode == 0 else out.stderr.strip() or f"unshare ended with status {out.returncode}"


def enter():
    """Starts this program again in a network namespace of its own, unless it is in one already."""
    if os.environ.get(INSIDE) == "1":
        run("ip", "link", "set", "lo", "up")
        signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended by SIGTERM"))  # what was started is ended too
        return
    os.execvpe("unshare", [*unshare(), sys.executable, *sys.argv], {**os.environ, INSIDE: "1"})


class Host:
    """A namespace with one interface, on the bridge."""

    def __init__(self, index, rate):
        self.address = f"10.99.0.{index + 1}"
        self.link = f"host{index}"  # the bridge's end
        # `cat` ends with this process, which holds the other end of its input.
        self.holder = subprocess.Popen(["unshare", "--net", "sh", "-c", "echo made && exec cat"],
                                       stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        if self.holder.stdout.readline().strip() != "made":
            raise RuntimeError("no network namespace was made")
        run("ip", "link", "add", self.link, "type", "veth", "peer", "name", "eth0", "netns", str(self.holder.pid))
        run("ip", "link", "set", self.link, "master", "bridge", "up")
        self.run("ip", "link", "set", "lo", "up")
        self.run("ip", "address", "add", self.address + "/24", "dev", "eth0")
        self.run("ip", "link", "set", "eth0", "up")
        shape = ["root", "tbf", "rate", rate, "burst", "64kb", "latency", "400ms"]
        run("tc", "qdisc", "add", "dev", self.link, *shape)
        self.run("tc", "qdisc", "add", "dev", "eth0", *shape)

    def command(self, *command):
        return ["nsenter", f"--net=/proc/{self.holder.pid}/ns/net", *command]

    def run(self, *command):
        return run(*self.command(*command))

    def popen(self, *command, **options):
        """Runs it on this host; the process id is the command's own."""
        return subprocess.Popen(self.command(*command), **options)

    def drop_some(self, share):
        """Loses this share of the packets that arrive, at random. Raises where iptables cannot."""
        self.run("iptables", "-A", "INPUT", "-i", "eth0", "-m", "statistic", "--mode", "random",
                 "--probability", str(share), "-j", "DROP")

    def packets(self):
        """That have come, and those of them that `drop_some` has lost."""
        rule = self.run("iptables", "-L", "INPUT", "-v", "-x", "-n").splitlines()[2].split()
        link = json.loads(self.run("ip", "-s", "-j", "link", "show", "eth0"))[0]
        return link["stats64"]["rx"]["packets"], int(rule[0])

    def cut(self, silently=False):
        """No packet comes or goes until `mend`. Silently: the host's own interface stays up."""
        if silently:
            for chain in ("INPUT", "OUTPUT"):
                self.run("iptables", "-I", chain, "-j", "DROP")
        else:
            run("ip", "link", "set", self.link, "down")

    def mend(self, silently=False):
        if silently:
            for chain in ("INPUT", "OUTPUT"):
                self.run("iptables", "-D", chain, "-j", "DROP")
        else:
            run("ip", "link", "set", self.link, "up")

    def close(self):
        # With the namespace it would go too, but some time later: the next host of this name would find it.
        run("ip", "link", "delete", self.link)
        self.holder.communicate()


class Network:
    """`count` hosts on a bridge, each behind a link of `rate`; this process is on the bridge itself."""

    def __init__(self, count, rate="50mbit"):
        run("ip", "link", "add", "bridge", "type", "bridge")
        run("ip", "address", "add", BRIDGE_ADDRESS + "/24", "dev", "bridge")
        run("ip", "link", "set", "bridge", "up")
        self.hosts = []
        try:
            for index in range(count):
                self.hosts.append(Host(index, rate))
        except BaseException:
            self.close()
            raise

    def close(self):
        for host in self.hosts:
            host.close()
        self.hosts = []
        run("ip", "link", "delete", "bridge")

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()


class SlowProxy:
    """Takes connections at BRIDGE_ADDRESS:port and passes them on to `target`, every byte `delay` seconds late."""

    def __init__(self, target, port, delay):
        self.host, self.port = target.rsplit(":", 1)
        self.address = f"{BRIDGE_ADDRESS}:{port}"
        self.delay = delay
        self.loop = asyncio.new_event_loop()
        self.loop.run_until_complete(asyncio.start_server(self._connected, BRIDGE_ADDRESS, port))
        self.thread = threading.Thread(target=self.loop.run_forever, daemon=True)
        self.thread.start()

    async def _connected(self, reader, writer):
        try:
            there, back = await asyncio.open_connection(self.host, int(self.port))
        except OSError:
            writer.close()
            return
        await asyncio.gather(self._pass_on(reader, back), self._pass_on(there, writer))

    async def _pass_on(self, reader, writer):
        on_the_way = asyncio.Queue()

        async def read():
            try:
                while data := await reader.read(65536):
                    on_the_way.put_nowait((self.loop.time() + self.delay, data))
            except OSError:
                pass
            on_the_way.put_nowait((self.loop.time() + self.delay, b""))

        async def write():
            try:
                while True:
                    due, data = await on_the_way.get()
                    await asyncio.sleep(max(0, due - self.loop.time()))
                    if not data:
                        break
                    writer.write(data)
                    await writer.drain()
            except OSError:
                pass
            writer.close()

        await asyncio.gather(read(), write())

    def close(self):
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join()


if __name__ == "__main__":
    REASON = why_not()
    print("network namespaces can be made" if not REASON else f"SKIPPED: no network namespaces here: {REASON}")
