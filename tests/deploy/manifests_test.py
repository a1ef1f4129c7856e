"""deploy/kubernetes: every document against its schema, every argument against the real binary, and what must agree: ports,
probes, users, replicas, times. Each check is also seen to fail on a manifest with a mistake in it."""

import copy
import os
import pathlib
import re
import shutil
import subprocess
import unittest

import grpc
import jsonschema
import kubernetes_validate
import yaml
from grpc_health.v1 import health_pb2, health_pb2_grpc

from kustomize import build, containers_of

TOP = pathlib.Path(os.environ["TOP"]).resolve()
DEPLOY = TOP / "deploy"
FOLDERS = ["cpu", "gpu", "gpu-rdma"]
LWS_CRD = TOP.parent / "shared/k8s/leaderworkerset-crd-v0.9.0.yaml"
LWS_GROUP = "leaderworkerset.x-k8s.io"
OLDEST, NEWEST = "1.30", "1.37"  # what soloist.yaml asks for, and what kubernetes-validate knows
LEADER_CALLS = {"soloist.v1.InferenceService", "soloist.v1.ControlService"}


def strict(schema):
    """A CRD's schema as the API server reads it with --validate=strict: fields that it does not know are errors."""
    if isinstance(schema, list):
        return [strict(s) for s in schema]
    if not isinstance(schema, dict):
        return schema
    schema = {k: strict(v) for k, v in schema.items()}
    if isinstance(schema.get("properties"), dict) and not schema.get("x-kubernetes-preserve-unknown-fields"):
        schema.setdefault("additionalProperties", False)
    if schema.get("x-kubernetes-int-or-string") is True:
        schema.pop("type", None)
    return schema


def lws_schema():
    crd = yaml.safe_load(LWS_CRD.read_text(encoding="utf-8"))
    (version,) = [v for v in crd["spec"]["versions"] if v["name"] == "v1"]
    schema = strict(version["schema"]["openAPIV3Schema"])
    schema["properties"]["metadata"] = {"type": "object"}
    return schema


def schema_errors(document, version):
    """Messages; a kind without a schema is an error."""
    if document["apiVersion"].startswith(LWS_GROUP):
        found = jsonschema.Draft7Validator(lws_schema()).iter_errors(document)
        return [f"{'/'.join(map(str, e.path))}: {e.message}" for e in found]
    try:
        kubernetes_validate.validate(document, version, strict=True)
    except (kubernetes_validate.ValidationError, kubernetes_validate.SchemaNotFoundError) as error:
        return [str(error)]
    return []


def pod_specs(document):
    """(name, pod spec, replicas, LWS index or None) of each pod template."""
    spec = document.get("spec", {})
    if document["kind"] == "StatefulSet":
        yield document["metadata"]["name"], spec["template"]["spec"], spec["replicas"], None
    elif document["kind"] == "LeaderWorkerSet":
        template = spec["leaderWorkerTemplate"]
        yield "leader", template["leaderTemplate"]["spec"], 1, 0
        yield "worker", template["workerTemplate"]["spec"], template["size"] - 1, 1


def environment(documents, container, lws):
    """Variables as the kubelet makes them; addresses are made up. `lws`: (index, size) or None."""
    maps = {d["metadata"]["name"]: d["data"] for d in documents if d["kind"] == "ConfigMap"}
    values = {}
    for source in container.get("envFrom", []):
        values.update(maps[source["configMapRef"]["name"]])
    for entry in container.get("env", []):
        values[entry["name"]] = entry.get("value", "10.0.0.7")
    if lws is not None:
        values.update(LWS_LEADER_ADDRESS="soloist-0.soloist.ns", LWS_WORKER_INDEX=str(lws[0]), LWS_GROUP_SIZE=str(lws[1]))
    return values


def arguments(container, values):
    def expand(match):
        if match.group(1) not in values:
            raise KeyError(f"$({match.group(1)}) is set nowhere")
        return values[match.group(1)]
    return [re.sub(r"\$\((\w+)\)", expand, a) for a in container["args"]]


def check_flags(args, values):
    """What the real binary says of its arguments; empty if they are good."""
    run = subprocess.run([os.environ["SOLOIST"], *args, "--check-flags"], env=values, capture_output=True, text=True,
                         timeout=60, check=False)
    return "" if run.returncode == 0 else run.stderr or f"status {run.returncode}"


def flag(args, name, default=None):
    found = [a.split("=", 1)[1] for a in args if a.startswith(f"--{name}=")]
    return found[-1] if found else default


class Cluster:
    """What the checks compare, of one kustomization's documents."""

    def __init__(self, documents):
        self.documents = documents
        self.pods = []  # (name, spec, replicas, container, arguments, values)
        size = next((d["spec"]["leaderWorkerTemplate"]["size"] for d in documents if d["kind"] == "LeaderWorkerSet"), None)
        for document in documents:
            for name, spec, replicas, index in pod_specs(document):
                for container in containers_of(spec):
                    values = environment(documents, container, None if index is None else (index, size))
                    self.pods.append((name, spec, replicas, container, arguments(container, values), values))
        (self.leader,) = [p for p in self.pods if p[4][0] == "serve"]
        self.workers = [p for p in self.pods if p[4][0] == "worker"]

    def ports(self, name):
        return int(flag(self.leader[4], name).rsplit(":", 1)[1])

    def problems(self):
        yield from self.argument_problems()
        yield from self.size_problems()
        yield from self.time_problems()
        yield from self.port_problems()
        yield from self.security_problems()

    def argument_problems(self):
        for name, _, _, container, args, values in self.pods:
            wrong = check_flags(args, values)
            if wrong:
                yield f"{name}/{container['name']}: {wrong}"

    def size_problems(self):
        ranks = sum(replicas * int(flag(args, "ranks-per-worker", "1")) for _, _, replicas, _, args, _ in self.workers)
        wanted = int(flag(self.leader[4], "workers")) + int(flag(self.leader[4], "spares", "0"))
        if ranks != wanted:
            yield f"{ranks} ranks in the pods, the leader waits for {wanted}"
        for name, _, _, container, args, values in self.workers:
            gpus = container["resources"]["limits"].get("nvidia.com/gpu", 0)
            if flag(args, "device") == "cuda" and gpus != int(flag(args, "ranks-per-worker", "1")):
                yield f"{name}: {gpus} GPUs for {flag(args, 'ranks-per-worker')} ranks"
            leader_device = flag(self.leader[4], "device", "cpu")
            if flag(args, "device", "cpu") != leader_device:
                yield f"{name}: --device={flag(args, 'device')}, the leader's {leader_device}"
            if flag(args, "device", "cpu") == "cpu":
                if flag(self.leader[4], "num-blocks", "0") == "0":
                    yield "CPU workers without --num-blocks take half of the host's memory"
                if str(container["resources"]["limits"]["cpu"]) != flag(args, "threads"):
                    yield f"{name}: --threads is {flag(args, 'threads')}, the CPU limit another"
            if "shm" not in [v["name"] for v in container["volumeMounts"]] and gpus:
                yield f"{name}: no /dev/shm of its own"

    def time_problems(self):
        drain = float(flag(self.leader[4], "drain-timeout"))
        needed = self.leader[3]["lifecycle"]["preStop"]["sleep"]["seconds"] + drain
        if self.leader[1]["terminationGracePeriodSeconds"] < needed + 10:
            yield f"the leader's grace period is not 10 s above preStop + drain, {needed} s"
        for name, spec, _, container, _, _ in self.workers:
            sidecar = container.get("restartPolicy") == "Always"  # ends after its pod's other containers
            sleep = container.get("lifecycle", {}).get("preStop", {}).get("sleep", {}).get("seconds", 0)
            if not sidecar and sleep < needed:
                yield f"{name}: ends {sleep} s after SIGTERM, the leader may drain for {needed} s"
            if spec["terminationGracePeriodSeconds"] < sleep + 10:
                yield f"{name}: the grace period is not 10 s above preStop"

    def port_problems(self):
        grpc_port, cluster_port = self.ports("grpc-address"), self.ports("cluster-address")
        container = self.leader[3]
        named = {p["name"]: p["containerPort"] for p in container["ports"]}
        if named != {"grpc": grpc_port, "cluster": cluster_port}:
            yield f"container ports {named}, the arguments say {grpc_port} and {cluster_port}"
        for probe, service in [("startupProbe", "soloist.v1.ControlService"), ("livenessProbe", "soloist.v1.ControlService"),
                               ("readinessProbe", "soloist.v1.InferenceService")]:
            if container[probe]["grpc"] != {"port": grpc_port, "service": service}:
                yield f"{probe}: {container[probe]['grpc']}, expected {service} at {grpc_port}"
        for document in self.documents:
            if document["kind"] == "Service" and document["spec"].get("clusterIP") != "None":
                (port,) = document["spec"]["ports"]
                if named.get(port["targetPort"]) != grpc_port:
                    yield f"Service {document['metadata']['name']}: {port}"
        headless = {d["metadata"]["name"]: d["spec"] for d in self.documents
                    if d["kind"] == "Service" and d["spec"].get("clusterIP") == "None"}
        (policy,) = [d["spec"] for d in self.documents if d["kind"] == "NetworkPolicy"]
        clients, cluster = policy["ingress"]
        if [p["port"] for p in clients["ports"]] != [grpc_port]:
            yield f"NetworkPolicy lets clients reach {clients['ports']}"
        for name, _, _, _, args, _ in self.workers:
            dialled = flag(args, "leader")
            if dialled is not None:
                host, port = dialled.rsplit(":", 1)
                service = headless.get(host.split(".")[1], {})
                if int(port) != cluster_port or not service.get("publishNotReadyAddresses"):
                    yield f"{name}: --leader={dialled} is not the leader's name and port"
            ports = flag(args, "comm-ports")
            wanted = [{"port": cluster_port}] if ports else None
            if ports:
                first, last = map(int, ports.split("-"))
                wanted.append({"port": first, "endPort": last})
            elif int(flag(args, "leader-port", "50052")) != cluster_port:
                yield f"{name}: dials the default port, the leader listens at {cluster_port}"
            for direction, rule in [("ingress", cluster), ("egress", policy["egress"][0])]:
                if rule.get("ports") != wanted:
                    yield f"NetworkPolicy {direction} inside: {rule.get('ports')}, {name} needs {wanted}"

    def security_problems(self):
        user = int(re.search(r"^USER (\d+):\1$", (DEPLOY / "container/Containerfile").read_text(encoding="utf-8"), re.M)[1])
        for name, spec, _, container, _, _ in self.pods:
            pod, own = spec["securityContext"], container["securityContext"]
            if (pod.get("runAsUser"), pod.get("runAsGroup"), pod.get("runAsNonRoot")) != (user, user, True):
                yield f"{name}: runs as {pod}, the image's user is {user}"
            if own != {"allowPrivilegeEscalation": False, "readOnlyRootFilesystem": True, "capabilities": {"drop": ["ALL"]}}:
                yield f"{name}/{container['name']}: {own}"
            if pod.get("seccompProfile") != {"type": "RuntimeDefault"}:
                yield f"{name}: seccomp {pod.get('seccompProfile')}"
            if any(key in spec for key in ("hostNetwork", "hostPID", "hostIPC")):
                yield f"{name}: shares the host's namespaces"
            volumes, mounts = {v["name"] for v in spec["volumes"]}, {m["name"] for m in container["volumeMounts"]}
            if not mounts <= volumes or "tmp" not in mounts:
                yield f"{name}/{container['name']}: mounts {mounts} of {volumes}"


class ManifestsTest(unittest.TestCase):
    def setUp(self):
        self.built = {f: build(DEPLOY / "kubernetes" / f) for f in FOLDERS}

    def test_schemas(self):
        for folder, documents in self.built.items():
            for document in documents:
                if document["kind"] == "LeaderWorkerSet" and not LWS_CRD.exists():
                    print(f"SKIPPED: {folder}: LeaderWorkerSet not checked: no {LWS_CRD}")
                    continue
                for version in [OLDEST, NEWEST]:
                    self.assertEqual(schema_errors(document, version), [], (folder, document["kind"]))

    def test_schemas_notice_mistakes(self):
        (stateful, *_) = [d for d in self.built["cpu"] if d["kind"] == "StatefulSet"]
        for change in [lambda s: s.update(replicaz=4), lambda s: s.update(replicas="four"), lambda s: s.pop("selector")]:
            wrong = copy.deepcopy(stateful)
            change(wrong["spec"])
            self.assertNotEqual(schema_errors(wrong, NEWEST), [])
        self.assertNotEqual(schema_errors({**stateful, "kind": "StatefulSot"}, NEWEST), [])
        if LWS_CRD.exists():
            (lws,) = [d for d in self.built["gpu"] if d["kind"] == "LeaderWorkerSet"]
            for key, value in [("size", "two"), ("sizze", 2), ("restartPolicy", "Never")]:
                wrong = copy.deepcopy(lws)
                wrong["spec"]["leaderWorkerTemplate"][key] = value
                self.assertNotEqual(schema_errors(wrong, NEWEST), [], key)

    def test_kustomize_agrees(self):
        if shutil.which("kubectl") is None:
            print("SKIPPED: no kubectl: tests/deploy/kustomize.py not compared with it")
            return
        key = lambda d: (d["kind"], d["metadata"]["name"])
        for folder, documents in self.built.items():
            out = subprocess.run(["kubectl", "kustomize", DEPLOY / "kubernetes" / folder], capture_output=True, text=True,
                                 timeout=60, check=True).stdout
            theirs = sorted(yaml.safe_load_all(out), key=key)
            self.assertEqual(theirs, sorted(documents, key=key), folder)

    def test_all_agree(self):
        for folder, documents in self.built.items():
            self.assertEqual(list(Cluster(documents).problems()), [], folder)

    def test_mistakes_are_noticed(self):
        def first(documents, kind):
            return next(d for d in documents if d["kind"] == kind)

        def args_of(documents, command):
            return next(c["args"] for d in documents for c in containers_of(d) if c["args"][0] == command)

        def replace(command, old, new):
            def change(documents):
                args = args_of(documents, command)
                args[args.index(old)] = new
            return change

        def leader(change):
            return lambda documents: change(next(c for d in documents for c in containers_of(d) if c["args"][0] == "serve"))

        plants = [
            (replace("serve", "--drain-timeout=30", "--drain-timeouts=30"), "drain-timeouts", True),
            (replace("worker", "--device=cpu", "--device=cuda"), "the leader's cpu", False),
            (replace("worker", "--comm-ports=50060-50069", "--comm-ports=50060"), "expected FIRST-LAST", True),
            (replace("worker", "--comm-ports=50060-50069", "--comm-ports=50060-50079"), "NetworkPolicy ingress", False),
            (replace("serve", "--cluster-address=0.0.0.0:50052", "--cluster-address=0.0.0.0:50053"), "is not the leader's", False),
            (replace("serve", "--drain-timeout=30", "--drain-timeout=300"), "grace period", False),
            (replace("serve", "--num-blocks=$(NUM_BLOCKS)", "--num-blocks=0"), "half of the host's memory", False),
            (lambda d: first(d, "ConfigMap")["data"].update(WORKERS="8"), "leader waits for 8", False),
            (lambda d: first(d, "ConfigMap")["data"].update(SPARES="one"), "--spares", True),
            (leader(lambda c: c["readinessProbe"]["grpc"].update(service="soloist.v1.Inference")), "readinessProbe", False),
            (leader(lambda c: c["livenessProbe"]["grpc"].update(port=50052)), "livenessProbe", False),
            (leader(lambda c: c["securityContext"].update(privileged=True)), "privileged", False),
            (lambda d: first(d, "StatefulSet")["spec"]["template"]["spec"]["securityContext"].update(runAsUser=1000),
             "the image's user", False),
        ]
        for change, expected, from_arguments in plants:
            documents = copy.deepcopy(self.built["cpu"])
            change(documents)
            cluster = Cluster(documents)
            try:
                found = list(cluster.argument_problems() if from_arguments else cluster.problems())
            except (TypeError, ValueError) as error:  # a number that is none, after the arguments
                found = [str(error)]
            self.assertTrue(any(expected in f for f in found), (expected, found))

    def test_probes_are_services_of_the_server(self):
        """Asked of a real server: the names in probes are known to it, and a misspelt one is not."""
        with subprocess.Popen([os.environ["SOLOIST"], "serve", "--grpc-address=127.0.0.1:0", "--num-blocks=64",
                               "--model=" + os.environ["SOLOIST_MODEL"]],
                              stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as server:
            try:
                address = server.stdout.readline().split()[-1]
                health = health_pb2_grpc.HealthStub(grpc.insecure_channel(address))
                named = {c[p]["grpc"]["service"] for documents in self.built.values() for d in documents
                         for c in containers_of(d) for p in c if p.endswith("Probe")}
                self.assertEqual(named, LEADER_CALLS)
                for service in named:
                    # The answer's state depends on the moment; NOT_FOUND would be an exception.
                    health.Check(health_pb2.HealthCheckRequest(service=service), timeout=30)
                with self.assertRaises(grpc.RpcError):
                    health.Check(health_pb2.HealthCheckRequest(service="soloist.v1.Inference"), timeout=30)
            finally:
                server.terminate()
                server.wait(60)


if __name__ == "__main__":
    unittest.main()
