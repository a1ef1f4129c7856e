#!/usr/bin/env bash
# tidy.sh [FILE...]: clang-tidy over those files, or all of our sources, two at a time. A file whose text, headers and
# settings have not changed since it was found clean is not looked at again (cache in $HOME/.cache/soloist/tidy). Needs
# the generated protobuf headers: bazel build //proto:soloist_v1.
set -uo pipefail
cd "$(dirname "$0")/.." || exit
cache=$HOME/.cache/soloist/tidy
mkdir -p "$cache"
bin=$(bazel info bazel-bin 2>/dev/null)
# What bazel passes to every file, and what simd_bf16.cc and third-party headers need.
flags=(-std=c++20 -I. "-I$bin" -Wall -Wextra -DHWY_BROKEN_EMU128=0 -DPCRE2_CODE_UNIT_WIDTH=8 -DSPDLOG_COMPILED_LIB -DSPDLOG_FMT_EXTERNAL -DBOOST_ASIO_NO_DEPRECATED
  -isystemthird_party/.wheels/xgrammar/include -isystemthird_party/.wheels/jinja/include)
headers=$(git ls-files '*.h' .clang-tidy | sort | xargs sha256sum | sha256sum)
# shellcheck disable=SC2317  # xargs calls it
check() {
  local file=$1 key extra=()
  case $file in
    kernels/cpu/simd_bf16.cc) extra=(-mavx512f -mavx512bw -mavx512vl -mavx512bf16) ;;
    kernels/cuda/* | kernels/backend_with_cuda.cc | engine/comm/nccl.cc | engine/comm/nccl_session.cc)
      [[ -d /usr/local/cuda/include ]] || return 0
      extra=(-isystem/usr/local/cuda/include -isystemthird_party/.wheels/cudnn_frontend/include -DNV_CUDNN_FRONTEND_USE_DYNAMIC_LOADING)
      ;;
    *) ;;
  esac
  key=$( (echo "$headers" "${flags[@]}"; cat "$file") | sha256sum | cut -d' ' -f1)
  [[ -e $cache/$key ]] && return 0
  if clang-tidy-19 --quiet "$file" -- "${flags[@]}" "${extra[@]}" 2>/dev/null >"$cache/$key.log"; then
    rm -f "$cache/$key.log"
    touch "$cache/$key"
  else
    echo "== $file"
    cat "$cache/$key.log"
    rm -f "$cache/$key.log"
    return 1
  fi
}
export -f check
export cache headers
status=0
files=("$@")
if ((${#files[@]} == 0)); then mapfile -t files < <(git ls-files '*.cc'); fi
export flags_line="${flags[*]}"
# shellcheck disable=SC2016  # for the inner bash
printf '%s\n' "${files[@]}" | xargs -P 2 -I{} bash -c 'read -ra flags <<<"$flags_line"; check {}' || status=1
echo "tidy: ${#files[@]} files, $( ((status == 0)) && echo clean || echo with warnings)"
exit "$status"
