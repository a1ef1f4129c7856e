#!/usr/bin/env python3
"""tidy.py [FILE...]: clang-tidy over those files, or over all of our sources, two processes at a time.

Most of clang-tidy's time goes into headers, the same ones for every file of a folder. So the files of a folder are
checked as one translation unit that includes them all. Files whose local names collide go into a further unit.

A unit whose files, headers and settings have not changed since it was found clean is not looked at again (cache in
$HOME/.cache/soloist/tidy). Needs the generated protobuf headers: bazel build //proto:soloist_v1.
"""

import concurrent.futures
import hashlib
import os
import pathlib
import re
import subprocess
import sys
import tempfile

TOP = pathlib.Path(__file__).resolve().parent.parent
CACHE = pathlib.Path.home() / ".cache/soloist/tidy"
CUDA = pathlib.Path("/usr/local/cuda/include")
# What Bazel passes to every file.
FLAGS = [
    "-std=c++20", "-ferror-limit=0", "-I.", "-Wall", "-Wextra", "-Wno-missing-field-initializers", "-DHWY_BROKEN_EMU128=0",
    "-DPCRE2_CODE_UNIT_WIDTH=8", "-DSPDLOG_COMPILED_LIB", "-DSPDLOG_FMT_EXTERNAL", "-DBOOST_ASIO_NO_DEPRECATED",
    "-isystemthird_party/.wheels/xgrammar/include", "-isystemthird_party/.wheels/jinja/include",
]
CUDA_FLAGS = [
    f"-isystem{CUDA}", "-isystemthird_party/.wheels/cudnn_frontend/include",
    "-DNV_CUDNN_FRONTEND_USE_DYNAMIC_LOADING",
]
# A source file counts as a header here, since the unit includes it.
HEADERS = r"^(.*/)?(base|kernels|engine|scheduler|server|cli|tests)/.*\.(h|cc)$"
BF16_FLAGS = ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512bf16"]


def extra_flags(path):
    """Flags of one file beyond FLAGS; None where it can not be checked on this machine."""
    if path == "kernels/cpu/simd_bf16.cc":
        return BF16_FLAGS
    if path == "kernels/cpu/simd_amx.cc":
        return [*BF16_FLAGS, "-mamx-tile", "-mamx-bf16"]
    if path.startswith("kernels/cuda/") or path in (
            "kernels/backend_with_cuda.cc", "engine/comm/nccl.cc", "engine/comm/nccl_session.cc"):
        return CUDA_FLAGS if CUDA.is_dir() else None
    return []


def lines(*command):
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()


class Tidy:
    def __init__(self, scratch):
        self.scratch = scratch
        self.flags = FLAGS + ["-I" + lines("bazel", "info", "bazel-bin")[0]]
        digest = hashlib.sha256()
        for path in sorted(lines("git", "ls-files", "*.h", ".clang-tidy", "tests/tidy.py")):
            digest.update(pathlib.Path(path).read_bytes())
        self.common = digest.digest()

    def unit_of(self, files):
        unit = self.scratch / (hashlib.sha256(" ".join(files).encode()).hexdigest()[:16] + ".cc")
        unit.write_text("".join(f'#include "{file}"  // NOLINT(bugprone-suspicious-include)\n' for file in files))
        return unit

    def check(self, files, extra):
        """Checks files of one folder; returns what clang-tidy printed, empty if it found nothing."""
        digest = hashlib.sha256(self.common + " ".join(self.flags + extra).encode())
        for file in files:
            digest.update(pathlib.Path(file).read_bytes())
        clean = CACHE / digest.hexdigest()
        if clean.exists():
            return ""
        found = self.split(files, extra)
        if not found:
            clean.touch()
        return found

    def split(self, files, extra):
        """As tidy(), in several units if the compiler finds errors in one of all files: their names may collide."""
        printed = self.tidy(files, extra)
        if len(files) == 1 or "[clang-diagnostic-error]" not in printed:
            return printed
        named = re.findall(r"([^\s:]+):\d+:\d+: error: .*\[clang-diagnostic-error\]", printed)
        collide = [file for file in files[1:] if any(name.endswith(file) for name in named)] or files[-1:]
        return self.split([file for file in files if file not in collide], extra) + self.split(collide, extra)

    def tidy(self, files, extra):
        """What clang-tidy says of a unit, empty if nothing."""
        run = subprocess.run(
            ["clang-tidy-19", "--quiet", "--config-file=.clang-tidy", f"--header-filter={HEADERS}",
             str(self.unit_of(files)), "--", *self.flags, *extra],
            capture_output=True, text=True)
        return "" if run.returncode == 0 else f"== {' '.join(files)}\n{run.stdout}{run.stderr}"


def main():
    os.chdir(TOP)
    CACHE.mkdir(parents=True, exist_ok=True)
    files = sys.argv[1:] or lines("git", "ls-files", "*.cc")
    units = {}
    for file in files:
        extra = extra_flags(file)
        if extra is not None:
            units.setdefault((os.path.dirname(file), tuple(extra)), []).append(file)
    with tempfile.TemporaryDirectory() as scratch:
        tidy = Tidy(pathlib.Path(scratch))
        with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
            results = list(pool.map(lambda unit: tidy.check(unit[1], list(unit[0][1])), units.items()))
    found = "".join(results)
    print(found, end="")
    print(f"tidy: {len(files)} files, {'with warnings' if found else 'clean'}")
    sys.exit(1 if found else 0)


if __name__ == "__main__":
    main()
