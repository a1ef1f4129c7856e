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
  libboost1.81-dev=1.81.0 libgloo-dev=0.0~git20220518 prometheus-cpp-dev=1.0.1
  buildah=1.28.2 mmdebstrap=1.3.5 patch=2.7.6 skopeo=1.9.3 umoci=0.4.7
  iproute2=6.1.0 iptables=1.8.9 procps=2:4.0.2
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
wheels=(grpcio==1.85.1 grpcio-reflection==1.85.1 grpcio-health-checking==1.85.1 protobuf==7.36.2 kubernetes-validate==1.37.0
  jinja2==3.1.6 openai==3.54.0)
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

# The C++ core of xgrammar (third_party/xgrammar/README.md), compiled once: the builds with sanitizers link the same
# archive. Takes about two minutes the first time.
BuildXgrammar() {
  local folder=$top/third_party/.wheels/xgrammar requirement=xgrammar==0.2.8
  local sha256=8305646fd2b319d6c3003f51a1665e54cbbe9cba1fb636bc41d0b46434ccbb80
  local stamp="$requirement $sha256 1" # the last number: of this recipe
  [[ $(cat "$folder/installed" 2>/dev/null) != "$stamp" ]] || return 0
  echo "install: building $requirement" >&2
  mkdir -p "$top/third_party/.wheels"
  local scratch source
  scratch=$(mktemp -d "$top/third_party/.wheels/build.XXXXXX")
  echo "$requirement --hash=sha256:$sha256" >"$scratch/requirements.txt"
  "$top/.venv/bin/pip" download --quiet --disable-pip-version-check --no-deps --no-binary=xgrammar --require-hashes \
    --dest "$scratch" --requirement "$scratch/requirements.txt"
  tar -xzf "$scratch/xgrammar-0.2.8.tar.gz" -C "$scratch"
  source=$scratch/xgrammar-0.2.8
  mkdir -p "$scratch/objects" "$scratch/xgrammar/lib"
  # Position independent, for whatever links it; its own checks of what cannot happen and its stack traces are left out; its
  # warnings and errors come to us (server/grammar/grammar_log.cc).
  # shellcheck disable=SC2016 # the inner shell expands $1
  (cd "$source" && printf '%s\0' cpp/*.cc cpp/support/*.cc cpp/converter_ext/*.cc |
    xargs -0 -n 1 -P "$(nproc)" sh -c 'g++ -std=c++17 -O2 -fPIC -DNDEBUG -DXGRAMMAR_ENABLE_CPPTRACE=0 -DXGRAMMAR_LOG_CUSTOMIZE=1 \
      -DXGRAMMAR_ENABLE_INTERNAL_CHECK=0 -Iinclude -isystem 3rdparty/picojson -isystem 3rdparty/dlpack/include \
      -c "$1" -o "../objects/$(echo "$1" | tr / _).o"' compile)
  ar -crs "$scratch/xgrammar/lib/libxgrammar.a" "$scratch"/objects/*.o
  cp -r "$source/include" "$scratch/xgrammar/include"
  cp -r "$source/3rdparty/dlpack/include/dlpack" "$scratch/xgrammar/include/"
  mkdir "$scratch/xgrammar/licenses"
  local file
  for file in LICENSE NOTICE 3rdparty/picojson/LICENSE 3rdparty/dlpack/LICENSE; do
    [[ ! -f $source/$file ]] || cp "$source/$file" "$scratch/xgrammar/licenses/${file//\//_}"
  done
  echo "$stamp" >"$scratch/xgrammar/installed"
  rm -rf "$folder"
  mv "$scratch/xgrammar" "$folder"
  rm -rf "$scratch"
}
BuildXgrammar

# The jinja engine of llama.cpp with our patch (third_party/jinja/README.md), and the templates that come with it, for the
# tests. The download is 77 MB; takes about 40 seconds.
BuildJinja() {
  local folder=$top/third_party/.wheels/jinja requirement=llama-cpp-python==0.3.36
  local sha256=832db0699007f1be95a7e41ef12e88926b02ba836461e36a36372db2760c1a2e
  local patch=$top/third_party/jinja/engine.patch stamp
  stamp="$requirement $sha256 1 $(sha256sum <"$patch")" # the number: of this recipe
  [[ $(cat "$folder/installed" 2>/dev/null) != "$stamp" ]] || return 0
  echo "install: building the jinja engine of $requirement" >&2
  mkdir -p "$top/third_party/.wheels"
  local scratch source file
  scratch=$(mktemp -d "$top/third_party/.wheels/build.XXXXXX")
  echo "$requirement --hash=sha256:$sha256" >"$scratch/requirements.txt"
  "$top/.venv/bin/pip" download --quiet --disable-pip-version-check --no-deps --no-binary=llama-cpp-python --require-hashes \
    --dest "$scratch" --requirement "$scratch/requirements.txt"
  source=llama_cpp_python-0.3.36/vendor/llama.cpp
  tar -xzf "$scratch/llama_cpp_python-0.3.36.tar.gz" -C "$scratch" --wildcards \
    "$source/common/jinja/*" "$source/common/unicode.*" "$source/models/templates/*" "$source/LICENSE"
  source=$scratch/$source
  patch --quiet --strip=1 --directory="$source" <"$patch"
  mkdir -p "$scratch/objects" "$scratch/jinja"/{include/jinja,lib,licenses}
  # -fwrapv: what a template computes may overflow. Not caps.cpp, which we do not use.
  # shellcheck disable=SC2016 # the inner shell expands $1
  (cd "$source/common" && printf '%s\0' jinja/{lexer,parser,runtime,string,value}.cpp unicode.cpp |
    xargs -0 -n 1 -P "$(nproc)" sh -c 'g++ -std=c++20 -O2 -fPIC -fwrapv -DNDEBUG -w -I. -c "$2" -o "$1/$(basename "$2").o"' \
      compile "$scratch/objects")
  ar -crs "$scratch/jinja/lib/libjinja.a" "$scratch"/objects/*.o
  for file in lexer limits parser runtime string utils value; do
    cp "$source/common/jinja/$file.h" "$scratch/jinja/include/jinja/"
  done
  cp -r "$source/models/templates" "$scratch/jinja/templates"
  cp "$source/LICENSE" "$scratch/jinja/licenses/"
  echo "$stamp" >"$scratch/jinja/installed"
  rm -rf "$folder"
  mv "$scratch/jinja" "$folder"
  rm -rf "$scratch"
}
BuildJinja

# Where the BUILD files look for them. Made here and not kept in git: a symbolic link does not survive every way of copying
# a tree.
for folder in xgrammar jinja; do
  ln -sfn "../.wheels/$folder/include" "$top/third_party/$folder/include"
  ln -sfn "../.wheels/$folder/lib" "$top/third_party/$folder/lib"
done
if [[ -d $top/third_party/.wheels/cudnn_frontend ]]; then
  ln -sfn ../.wheels/cudnn_frontend/include "$top/third_party/cudnn_frontend/include"
fi
