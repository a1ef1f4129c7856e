#!/usr/bin/env bash
# Packs built GPU tests for a machine without Bazel: stripped binaries, the shared libraries that such a machine may
# lack (not the C library's, the driver's or CUDA's), run.sh and nccl.sh.
#   bundle.sh FOLDER [BINARY...]    default: what `bazel build --config=cuda //tests/gpu:all` made
set -euo pipefail
root=$(cd "$(dirname "$0")/../.." && pwd)
if (($# == 0)); then
  echo "usage: bundle.sh FOLDER [BINARY...]" >&2
  exit 2
fi
folder=$1
shift
if (($# == 0)); then set -- "$root"/bazel-out/k8-opt-cuda/bin/tests/gpu/{cuda_ops_test,cuda_parity_test}; fi
mkdir -p "$folder/lib"
rm -f "$folder"/lib/*
for binary in "$@"; do
  install -m 755 "$binary" "$folder/$(basename "$binary")"
  strip "$folder/$(basename "$binary")"
  while read -r library; do
    case $(basename "$library") in
      libc.so.* | libm.so.* | libdl.so.* | librt.so.* | libpthread.so.* | ld-linux*) ;;
      libcuda.so.* | libcudart.so.* | libcublas*.so.* | libcudnn*.so.* | libnccl.so.*) ;;
      *) install -m 644 "$(readlink -f "$library")" "$folder/lib/$(basename "$library")" ;;
    esac
  done < <(ldd "$binary" | awk '$3 ~ /^\// {print $3}')
done
strip --strip-unneeded "$folder"/lib/*.so* 2>/dev/null || true
install -m 755 "$root/tests/gpu/run.sh" "$root/tests/gpu/nccl.sh" "$folder/"
du -sh "$folder"
