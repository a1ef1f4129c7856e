"""Reads the tree's #include graph and build files and reports what breaks the architecture of docs/design.md.

check_structure.py TREE      prints one line per violation; exit status 1 if there is any
check_structure.py --self-test TREE   plants each kind of violation in a copy, and fails if one goes unnoticed
"""

import os
import pathlib
import re
import shutil
import sys
import tempfile

# Who may include whom: folder -> folders. The longest prefix of a file's path decides. tests/ may include everything.
ALLOWED = {
    "base": set(),
    "proto": set(),
    "kernels": {"base"},
    "kernels/cpu": {"base", "kernels"},
    "kernels/cuda": {"base", "kernels"},
    "engine": {"base", "kernels"},
    "engine/comm": {"base", "kernels", "engine"},
    "engine/placement": {"base", "kernels", "engine"},
    "engine/model": {"base", "kernels", "engine", "engine/comm", "engine/placement"},
    "engine/worker": {"base", "kernels", "engine", "engine/comm", "engine/placement", "engine/model"},
    "engine/cluster": {"base", "proto", "kernels", "engine", "engine/comm", "engine/placement", "engine/model",
                       "engine/worker"},
    "scheduler": {"base", "engine"},
    "server/tokenizer": {"base"},
    "server/grammar": {"base", "engine", "scheduler", "server/tokenizer"},
    "server": {"base", "proto", "engine", "scheduler", "server/grammar", "server/tokenizer"},
    "server/http": {"base", "engine", "scheduler", "server", "server/grammar", "server/tokenizer"},
    "cli": {"base", "proto", "kernels", "engine", "engine/model", "engine/worker", "engine/cluster", "scheduler", "server",
            "server/http", "server/tokenizer"},
}
# Single files that a backend's link-time choice needs.
EXTRA = {
    "kernels/backend_cpu_only.cc": {"kernels/cpu"},
    "kernels/backend_with_cuda.cc": {"kernels/cpu", "kernels/cuda"},
    "engine/comm/nccl.cc": {"kernels/cuda"},
}
# Third-party headers that only some folders may see.
ONLY_IN = {
    "CLI/": {"cli"},
    "boost/": {"server/http", "cli"},
    "grpcpp/": {"server", "cli", "engine/cluster"},
    "immintrin.h": {"kernels/cpu"},
    "hwy/": {"kernels/cpu"},
    "cuda": {"kernels/cuda", "engine/comm"},
    "nccl": {"engine/comm"},
    "gloo/": {"engine/comm"},
    "pcre2.h": {"server/tokenizer"},
    "jinja/": {"server"},
    "xgrammar/": {"server/grammar"},
}
SOURCES = (".h", ".cc", ".cu", ".cuh")
MAX_LINES = 400
TOP = ("base", "proto", "kernels", "engine", "scheduler", "server", "cli", "tests")


def folder_of(path):
    parts = path.split("/")
    for depth in range(len(parts) - 1, 0, -1):
        prefix = "/".join(parts[:depth])
        if prefix in ALLOWED:
            return prefix
    return parts[0]


def source_files(tree):
    for top in TOP:
        for directory, names, files in os.walk(tree / top):
            names[:] = [n for n in names if not n.startswith(".") and n != "__pycache__"]
            for name in files:
                yield str((pathlib.Path(directory) / name).relative_to(tree))


def check_includes(path, includes):
    folder = folder_of(path)
    if folder == "tests":
        return
    for target, quoted in includes:
        if quoted or target.split("/")[0] in TOP:
            to = folder_of(target)
            if to != folder and to not in ALLOWED[folder] and to not in EXTRA.get(path, set()):
                yield f"{path}: includes {target}: {folder}/ may not see {to}/"
            if path.endswith((".cu", ".cuh")) and not to.startswith("kernels"):
                yield f"{path}: includes {target}: .cu files see kernels/ only"
        for prefix, where in ONLY_IN.items():
            if target.startswith(prefix) and folder not in where:
                yield f"{path}: includes {target}: only {', '.join(sorted(where))} may"


def check_cycles(graph):
    """Depth-first search over headers; yields each cycle once."""
    state = {}

    def visit(node, stack):
        state[node] = "open"
        for target in sorted(graph.get(node, ())):
            if state.get(target) == "open":
                yield "cycle of headers: " + " -> ".join(stack[stack.index(target):] + [target])
            elif target not in state:
                yield from visit(target, stack + [target])
        state[node] = "done"

    for node in sorted(graph):
        if node not in state:
            yield from visit(node, [node])


def check_file(path, text):
    lines = text.split("\n")
    if len(lines) > MAX_LINES + 1 and "over 400 lines" not in "\n".join(lines[:15]):
        yield f"{path}: {len(lines) - 1} lines, more than {MAX_LINES} without 'over 400 lines' and a reason at its top"
    if path.endswith(".h"):
        guard = "SOLOIST_" + re.sub(r"[^A-Z0-9]", "_", path.upper()) + "_"
        # Highway's: once per instruction set.
        per_target = f"#if defined({guard}) == defined(HWY_TARGET_TOGGLE)\n"
        opening = per_target if path.endswith("-inl.h") else f"#ifndef {guard}\n#define {guard}\n"
        if opening not in text:
            yield f"{path}: include guard is not {guard}"
    for number, line in enumerate(lines, 1):
        if re.search(r"\b(TODO|FIXME|XXX)\b", line):
            yield f"{path}:{number}: unfinished: {line.strip()[:60]}"
    if path.endswith(SOURCES) and not text.lstrip().startswith("//") and path.endswith(".h"):
        yield f"{path}: a header starts with a comment that says what it is"


def check_build(path, text):
    if "default_visibility" not in text:
        rules = re.findall(r"^(\w+)\($(.*?)^\)", text, re.M | re.S)
        for rule, body in rules:
            if rule not in ("package", "load", "workspace", "exports_files") and "visibility" not in body:
                name = re.search(r'name = "([^"]+)"', body)
                yield f"{path}: {rule} {name.group(1) if name else '?'} has no visibility"
    if "//visibility:public" in text and not path.startswith("third_party/"):
        yield f"{path}: //visibility:public; name who may use it"


def check(tree):
    tree = pathlib.Path(tree)
    graph = {}
    for path in sorted(source_files(tree)):
        name = os.path.basename(path)
        if path == "tests/structure/check_structure.py":
            continue
        if path.endswith(SOURCES):
            text = (tree / path).read_text(encoding="utf-8")
            includes = [(t, q == '"') for q, t in re.findall(r'^\s*#\s*include\s*(["<])([^">]+)[">]', text, re.M)]
            ours = [(t, q) for t, q in includes if q and t.split("/")[0] in TOP]
            third = [(t, False) for t, q in includes if not (q and t.split("/")[0] in TOP)]
            yield from check_includes(path, ours + third)
            if path.endswith(".h"):
                graph[path] = {t for t, _ in ours}
            yield from check_file(path, text)
        elif path.endswith((".py", ".sh", ".proto")):
            yield from check_file(path, (tree / path).read_text(encoding="utf-8"))
        elif name in ("BUILD", "BUILD.bazel"):
            yield from check_build(path, (tree / path).read_text(encoding="utf-8"))
    yield from check_cycles(graph)


PLANTS = [  # file, text, what must be reported
    ("scheduler/planted.h", '#include "kernels/device.h"\n', "scheduler/ may not see kernels/"),
    ("scheduler/planted.h", '#include "engine/model/config.h"\n', "scheduler/ may not see engine/model/"),
    ("engine/planted.cc", '#include "scheduler/request.h"\n', "engine/ may not see scheduler/"),
    ("engine/comm/planted.cc", '#include "engine/worker/worker.h"\n', "engine/comm/ may not see engine/worker/"),
    ("kernels/planted.cc", '#include "engine/engine.h"\n', "kernels/ may not see engine/"),
    ("kernels/planted.cc", '#include "kernels/cpu/simd.h"\n', "kernels/ may not see kernels/cpu/"),
    ("base/planted.cc", '#include "kernels/tensor.h"\n', "base/ may not see kernels/"),
    ("server/planted.cc", '#include "cli/flags.h"\n', "server/ may not see cli/"),
    ("server/planted.cc", "#include <CLI/CLI.hpp>\n", "only cli may"),
    ("engine/planted.cc", "#include <immintrin.h>\n", "only kernels/cpu may"),
    ("kernels/cuda/planted.cu", '#include "base/status.h"\n', ".cu files see kernels/ only"),
    ("base/planted_a.h", '#include "base/planted_b.h"\n', "cycle of headers"),
    ("base/planted.cc", "// line\n" * 500, "more than 400"),
    ("base/planted.h", "// A header.\n#pragma once\n", "include guard is not SOLOIST_BASE_PLANTED_H_"),
    ("base/planted-inl.h", "// A header.\n#ifndef SOLOIST_BASE_PLANTED_INL_H_\n", "guard is not SOLOIST_BASE_PLANTED_INL_H_"),
    ("base/planted.cc", "// " + "TO" + "DO: later\n", "unfinished"),
    ("base/planted.h", "int x;\n", "starts with a comment"),
    ("base/planted/BUILD", 'cc_library(\n    name = "x",\n)\n', "has no visibility"),
    ("base/planted/BUILD", 'package(default_visibility = ["//visibility:public"])\n', "name who may use it"),
]


def self_test(tree):
    found = list(check(tree))
    if found:
        print("\n".join(found))
        return f"{len(found)} violations before anything was planted"
    with tempfile.TemporaryDirectory() as scratch:
        copy = pathlib.Path(scratch) / "tree"
        for path in source_files(pathlib.Path(tree)):
            (copy / path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(pathlib.Path(tree) / path, copy / path)
        (copy / "base/planted_b.h").write_text(
            '// B.\n#ifndef SOLOIST_BASE_PLANTED_B_H_\n#define SOLOIST_BASE_PLANTED_B_H_\n'
            '#include "base/planted_a.h"\n#endif\n', encoding="utf-8")
        for path, text, expected in PLANTS:
            (copy / path).parent.mkdir(parents=True, exist_ok=True)
            (copy / path).write_text(text, encoding="utf-8")
            reported = [line for line in check(copy) if expected in line]
            (copy / path).unlink()
            if not reported:
                return f"not noticed: {path} with {text[:60]!r} (expected: {expected})"
    print(f"{len(PLANTS)} planted violations, all noticed")
    return None


def main():
    if sys.argv[1] == "--self-test":
        problem = self_test(sys.argv[2])
        if problem:
            print(problem)
        sys.exit(1 if problem else 0)
    found = list(check(sys.argv[1]))
    print("\n".join(found) or "structure: no violation")
    sys.exit(1 if found else 0)


if __name__ == "__main__":
    main()
