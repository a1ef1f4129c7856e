#!/usr/bin/env bash
# bundle.sh BINARY MODEL_FILE... OUTPUT.tar.gz: the binary, the shared libraries that it needs besides glibc, the NVIDIA
# driver's and CUDA's run-time libraries, and the model that the files belong to. Unpacked anywhere, bin/soloist runs.
set -euo pipefail
binary=$1
output=${*: -1}
models=("${@:2:$#-2}")
stage=$(mktemp -d)
trap 'rm -rf "$stage"' EXIT
top=$stage/soloist
mkdir -p "$top/bin" "$top/lib" "$top/libexec" "$top/models"

# glibc comes with every machine, the others with the driver or the CUDA run time.
own='/(libc|libm|libdl|librt|libpthread|libresolv|ld-linux-x86-64|libcuda|libcudart|libcublas|libcublasLt|libcudnn|libnccl|libnvrtc)[-.0-9]*\.so'
ldd "$binary" | awk '$2 == "=>" && $3 ~ /^\// {print $3}' | sort -u | while read -r library; do
  [[ $library =~ $own ]] || cp -L "$library" "$top/lib/"
done
strip -o "$top/libexec/soloist" "$binary"
cat >"$top/bin/soloist" <<'RUN'
#!/bin/sh
# Runs the binary with the libraries that came with it; CUDA's are looked for where NVIDIA's installers put them.
top=$(cd "$(dirname "$0")/.." && pwd)
export LD_LIBRARY_PATH="$top/lib:${LD_LIBRARY_PATH:+$LD_LIBRARY_PATH:}/usr/local/cuda/lib64:/usr/local/cuda/targets/x86_64-linux/lib"
exec "$top/libexec/soloist" "$@"
RUN
chmod +x "$top/bin/soloist"
for file in "${models[@]}"; do
  path=${file#*models/}
  mkdir -p "$top/models/$(dirname "$path")"
  cp -L "$file" "$top/models/$path"
done
tar --sort=name --owner=0 --group=0 --numeric-owner --mtime='2026-01-01' -C "$stage" -cf - soloist | gzip -n -6 >"$output"
echo "bundle: $(stat -c %s "$output") bytes, $(find "$top/lib" -type f | wc -l) libraries" >&2
