#!/usr/bin/env bash
# Installs every Debian package that the build and the tests need. Idempotent: quick where nothing is missing.
# Versions are Debian 12's (bookworm); a line below states the version that was built and tested with.
set -euo pipefail

packages=(
  bazel-bootstrap=4.2.3 bazel-rules-java bazel-rules-proto bazel-platforms bazel-skylib
  "g++=4:12.2.0" python3-venv clang-format-19=1:19.1.7 clang-19=1:19.1.7 clang-tidy-19=1:19.1.7
  libclang-rt-19-dev=1:19.1.7 libfuzzer-19-dev=1:19.1.7 shellcheck git ca-certificates
  libabsl-dev=20220623.1 libgmock-dev=1.12.1 libgrpc++-dev=1.51.1 libgtest-dev=1.12.1 libhwy-dev=1.0.3
  libpcre2-dev=10.42 libprotobuf-dev=3.21.12 libspdlog-dev=1:1.10.0 libfmt-dev=9.1.0 libutf8proc-dev=2.8.0
  libcli11-dev=2.1.2 nlohmann-json3-dev=3.11.2 protobuf-compiler=3.21.12 protobuf-compiler-grpc=1.51.1
)

missing=()
for package in "${packages[@]}"; do
  name=${package%%=*}
  dpkg-query -W -f='${db:Status-Status}' "$name" 2>/dev/null | grep -qx installed || missing+=("$name")
done
if ((${#missing[@]})); then
  sudo=()
  if ((EUID != 0)); then sudo=(sudo); fi
  echo "install: ${missing[*]}" >&2
  "${sudo[@]}" apt-get update -qq
  DEBIAN_FRONTEND=noninteractive "${sudo[@]}" apt-get install -y -qq --no-install-recommends "${missing[@]}" >/dev/null
fi
for package in "${packages[@]}"; do
  [[ $package == *=* ]] || continue
  found=$(dpkg-query -W -f='${Version}' "${package%%=*}")
  [[ $found == "${package#*=}"* ]] || echo "install: ${package%%=*} is $found, tested with ${package#*=}" >&2
done

# Python packages of the tests, in a virtual environment beside the tree's top.
top=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
wheels=(grpcio==1.85.1 grpcio-reflection==1.85.1 grpcio-health-checking==1.85.1 protobuf==7.36.2)
if [[ $(cat "$top/.venv/installed" 2>/dev/null) != "${wheels[*]}" ]]; then
  echo "install: Python environment .venv with ${wheels[*]}" >&2
  rm -rf "$top/.venv"
  python3 -m venv "$top/.venv"
  "$top/.venv/bin/pip" install --quiet --disable-pip-version-check "${wheels[@]}"
  echo "${wheels[*]}" >"$top/.venv/installed"
fi

# Headers of the CUDA backend, where there is a CUDA toolkit. Only the headers of these wheels are used: cuDNN itself
# comes with the toolkit or the driver's machine and is opened at run time (third_party/cudnn_frontend/README.md).
#
# UnpackHeaders FOLDER REQUIREMENT SHA256 PREFIX...: the files of the wheel below each PREFIX, to .wheels/FOLDER/include,
# and its licences beside them.
UnpackHeaders() {
  local folder=$top/third_party/.wheels/$1 requirement=$2 sha256=$3
  local stamp="$requirement $sha256"
  [[ $(cat "$folder/installed" 2>/dev/null) != "$stamp" ]] || return 0
  echo "install: headers of $requirement" >&2
  local scratch prefix
  scratch=$(mktemp -d "$top/third_party/.wheels/unpack.XXXXXX")
  echo "$requirement --hash=sha256:$sha256" >"$scratch/requirements.txt"
  "$top/.venv/bin/pip" download --quiet --disable-pip-version-check --no-deps --only-binary=:all: --require-hashes \
    --python-version 3.11 --platform manylinux_2_28_x86_64 --dest "$scratch" --requirement "$scratch/requirements.txt"
  "$top/.venv/bin/python" -m zipfile -e "$scratch"/*.whl "$scratch/wheel"
  mkdir -p "$scratch/include"
  for prefix in "${@:4}"; do cp -r "$scratch/wheel/$prefix/." "$scratch/include/"; done
  rm -rf "$folder"
  mkdir -p "$folder"
  mv "$scratch/include" "$scratch"/wheel/*.dist-info/licenses "$folder/"
  echo "$stamp" >"$folder/installed"
  rm -rf "$scratch"
}
if [[ -x /usr/local/cuda/bin/nvcc ]]; then
  mkdir -p "$top/third_party/.wheels"
  UnpackHeaders cudnn_frontend nvidia-cudnn-frontend==1.32.0 \
    c6006556017a4d1c914c52a556c71b1267f2d6a0500f742e7b4edef539878df0 include
fi
