#!/usr/bin/env bash
# Runs nccl_contract_test as N ranks, a process each, all on the one GPU of this machine: each says that it is another
# host, and they talk over sockets of the loopback interface.
#   nccl.sh N [PART...]      parts: collectives timing failure abort loss; default: all, one after another
# From a folder with the carried binary (see bundle.sh). Logs: $OUT or ./logs. Ends with "N passed, N failed".
set -uo pipefail
here=$(cd "$(dirname "$0")" && pwd)
ranks=${1:?number of ranks}
shift
parts=${*:-collectives timing failure abort loss}
limit=${LIMIT_S:-60} # of one rank's process; the test ends itself by then
logs=${OUT:-$here/logs}
mkdir -p "$logs"

# NCCL of the toolkit, else the one that came with PyTorch; the same for cuBLASLt and cuDNN.
libraries=$here/lib:/usr/local/cuda/lib64
for wanted in libnccl.so.2 libcublasLt.so.13 libcudnn.so.9; do
  [[ -e /usr/local/cuda/lib64/$wanted ]] && continue
  found=$(find / -xdev -name "$wanted" -not -path '/proc/*' 2>/dev/null | sort | head -n 1)
  [[ -n $found ]] && libraries+=:$(dirname "$found")
done
export LD_LIBRARY_PATH=$libraries${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}
export NCCL_SOCKET_IFNAME=lo NCCL_NET=Socket NCCL_NVLS_ENABLE=0

passed=0
failed=0
for part in $parts; do
  case $part in
    collectives) filter='NcclCollectives.*' ;;
    timing) filter='NcclTiming.*' ;;
    failure) filter='NcclFailure.*' ;;
    abort) filter='NcclAbort.*' ;;
    loss) filter='NcclLoss.*' ;;
    *)
      echo "unknown part $part: collectives, timing, failure, abort, loss" >&2
      exit 2
      ;;
  esac
  store=$(mktemp -d)
  seed=${SEED:-$RANDOM}
  begin=$SECONDS
  pids=()
  for ((rank = 0; rank < ranks; ++rank)); do
    NCCL_HOSTID=r$rank timeout -k 5 $((limit + 15)) "$here/nccl_contract_test" --rank=$rank --size="$ranks" \
      --store="$store" --seed="$seed" --limit_s="$limit" --gtest_filter="$filter" \
      >"$logs/nccl_${ranks}_${part}_$rank.log" 2>&1 &
    pids+=($!)
  done
  ok=0
  bad=0
  for ((rank = 0; rank < ranks; ++rank)); do
    wait "${pids[$rank]}"
    status=$?
    log=$logs/nccl_${ranks}_${part}_$rank.log
    counts=$(grep -aoE '[0-9]+ passed, [0-9]+ failed' "$log" | tail -n 1)
    rank_ok=${counts%% *}
    rank_bad=$(grep -oE '[0-9]+ failed' <<<"$counts" | cut -d' ' -f1)
    if ((status != 0 && ${rank_bad:-0} == 0)); then rank_bad=1; fi
    if [[ -z $counts && $status == 0 ]]; then rank_bad=1; fi
    ok=$((ok + ${rank_ok:-0}))
    bad=$((bad + ${rank_bad:-0}))
    # The first rank's table; of any rank what failed.
    if ((rank == 0)); then grep -a '^  ' "$log" | cut -c 1-400; fi
    if ((${rank_bad:-0} > 0)); then
      echo "-- $part, rank $rank, status $status:"
      grep -avE '^  |^\[ RUN|^\[       OK|^\[---|^\[===|^Note' "$log" | cut -c 1-400 | tail -n 25
    fi
  done
  rm -rf "$store"
  echo "== $ranks ranks, $part: $ok passed, $bad failed, $((SECONDS - begin)) s, seed $seed"
  passed=$((passed + ok))
  failed=$((failed + bad))
done
echo "$passed passed, $failed failed"
((failed == 0 && passed > 0))
