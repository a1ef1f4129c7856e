"""What `kubectl kustomize FOLDER` prints, for the part of kustomize that deploy/kubernetes uses: resources, namespace, images,
replicas, JSON patches. Anything else in a kustomization is an error."""

import pathlib

import yaml

KNOWN = {"apiVersion", "kind", "namespace", "resources", "images", "replicas", "patches"}


def load_all(path):
    return [d for d in yaml.safe_load_all(path.read_text(encoding="utf-8")) if d is not None]


def containers_of(value):
    """Every container below `value`, in pod templates of whatever kind."""
    if isinstance(value, dict):
        for key, inner in value.items():
            if key in ("containers", "initContainers"):
                yield from inner
            else:
                yield from containers_of(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from containers_of(inner)


def apply_patch(document, operations):
    for operation in operations:
        if operation["op"] != "add":
            raise ValueError(f"patch: op {operation['op']}, only add is known")
        *parents, last = [p.replace("~1", "/").replace("~0", "~") for p in operation["path"].split("/")[1:]]
        target = document
        for key in parents:
            target = target[int(key)] if isinstance(target, list) else target[key]
        if isinstance(target, list):
            target.insert(len(target) if last == "-" else int(last), operation["value"])
        else:
            target[last] = operation["value"]


def build(folder):
    folder = pathlib.Path(folder)
    (kustomization,) = load_all(folder / "kustomization.yaml")
    unknown = set(kustomization) - KNOWN
    if unknown:
        raise ValueError(f"{folder}: {unknown} in the kustomization")
    documents = []
    for name in kustomization["resources"]:
        documents += build(folder / name) if (folder / name).is_dir() else load_all(folder / name)
    for patch in kustomization.get("patches", []):
        matched = [d for d in documents
                   if (d["kind"], d["metadata"]["name"]) == (patch["target"]["kind"], patch["target"]["name"])]
        if len(matched) != 1:
            raise ValueError(f"{folder}: {len(matched)} documents match the target of {patch['path']}")
        apply_patch(matched[0], load_all(folder / patch["path"])[0])
    for document in documents:
        if "namespace" in kustomization:
            document["metadata"]["namespace"] = kustomization["namespace"]
        for replicas in kustomization.get("replicas", []):
            if document["kind"] == "StatefulSet" and document["metadata"]["name"] == replicas["name"]:
                document["spec"]["replicas"] = replicas["count"]
        for container in containers_of(document):
            for image in kustomization.get("images", []):
                if container["image"].split(":")[0] == image["name"]:
                    container["image"] = f"{image['newName']}:{image['newTag']}"
    return documents
