#!/usr/bin/env bash
# Installs every Debian package that the build and the tests need. Idempotent: quick where nothing is missing.
# Versions are Debian 12's (bookworm); a line below states the version that was built and tested with.
set -euo pipefail

packages=(
  bazel-bootstrap=4.2.3 bazel-rules-java bazel-rules-proto bazel-platforms bazel-skylib
  g++=4:12.2.0 clang-format-19=1:19.1.7 git ca-certificates
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
