#!/usr/bin/env bash
# Builds the CPU image and gets a request answered from inside it, as a container run time would run it: the entry point,
# user and environment of the image's configuration, a read-only root, no capabilities, a process namespace of its own.
#   image_test.sh [IMAGE.tar]      default: deploy/container/build.sh cpu
# Needs root, namespaces, buildah, skopeo, umoci (install.sh) and, to build, a Debian mirror. Skipped, with the reason, where
# the first two are not to be had.
set -euo pipefail
if ((EUID != 0)) || ! unshare --mount --pid --fork true 2>/dev/null; then
  echo "image_test: SKIPPED: needs root and the right to make mount and process namespaces" >&2
  exit 0
fi
top=$(cd "$(dirname "$(readlink -f "$0")")/../.." && pwd)
scratch=$(mktemp -d /tmp/soloist-image.XXXXXX)
server=
cleanup() {
  [[ -z $server ]] || kill -KILL "$server" 2>/dev/null || true
  wait 2>/dev/null || true
  rm -rf "$scratch"
}
trap cleanup EXIT
fail() { echo "image_test: FAILED: $*" >&2; [[ -e $scratch/log ]] && cat "$scratch/log" >&2; exit 1; }

image=${1-}
if [[ -z $image ]]; then
  image=$scratch/image.tar
  "$top/deploy/container/build.sh" cpu "$image"
fi
skopeo copy --quiet "oci-archive:$image" "oci:$scratch/layout:test"
umoci unpack --image "$scratch/layout:test" "$scratch/bundle" >/dev/null
root=$scratch/bundle/rootfs
config() { python3 -c "import json, sys; c = json.load(open('$scratch/bundle/config.json')); print($1)"; }

user=$(config "'%d:%d' % (c['process']['user']['uid'], c['process']['user']['gid'])")
[[ $user == 65532:65532 ]] || fail "the image's user is $user, not 65532:65532"
for name in sh bash dash busybox apt dpkg perl; do
  [[ -z $(find "$root" -xdev -name "$name" -type f -perm /111 -print -quit) ]] || fail "there is a $name inside"
done
skopeo inspect "oci-archive:$image" >"$scratch/inspect.json"
for label in version revision; do
  grep -q "org.opencontainers.image.$label\": \"[^\"]" "$scratch/inspect.json" || fail "no label org.opencontainers.image.$label"
done

# What a run time does, without one: private mounts and processes, the image's environment and nothing of ours, no right to
# gain privileges. chroot itself needs three capabilities; the change of user drops them.
cat >"$scratch/run" <<'RUN'
#!/usr/bin/env bash
set -euo pipefail
root=$1
mount --bind "$root" "$root"
mount -t proc -o ro proc "$root/proc"
mount -t tmpfs -o mode=1777 tmp "$root/tmp"
mount -o remount,ro,bind "$root"
mapfile -t environment <"$2"
exec env -i "${environment[@]}" "$(command -v setpriv)" --bounding-set=-all,+sys_chroot,+setuid,+setgid --inh-caps=-all \
  --no-new-privs "$(command -v chroot)" --userspec=65532:65532 "$root" "${@:3}"
RUN
chmod +x "$scratch/run"
config "'\n'.join(c['process']['env'])" >"$scratch/environment"
entry=$(config "c['process']['args'][0]")
inside() { exec unshare --mount --pid --fork --kill-child=KILL "$scratch/run" "$root" "$scratch/environment" "$entry" "$@"; }

version=$(inside --version) || fail "soloist --version"
echo "image_test: soloist $version inside, $(stat -c %s "$image") bytes of image, $(du -sm "$root" | cut -f1) MB unpacked"
# Workers too: the binary starts itself.
inside serve --model=/opt/soloist/models/tiny --workers=2 --spawn=local --grpc-address=127.0.0.1:0 \
  >"$scratch/out" 2>"$scratch/log" </dev/null &
server=$!
touch "$scratch/log"
for ((i = 0; i < 1200; ++i)); do
  grep -q ' ready: ' "$scratch/log" && break
  kill -0 "$server" 2>/dev/null || fail "the server has ended"
  sleep 0.1
done
grep -q ' ready: ' "$scratch/log" || fail "not ready after 120 s"
address=$(sed -n 's/^listening on //p' "$scratch/out")

"$top/.venv/bin/python" - "$address" <<'HEALTH' || fail "health"
import sys
import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
health = health_pb2_grpc.HealthStub(grpc.insecure_channel(sys.argv[1]))
for service in ["soloist.v1.InferenceService", "soloist.v1.ControlService"]:
    status = health.Check(health_pb2.HealthCheckRequest(service=service), timeout=20).status
    assert status == health_pb2.HealthCheckResponse.SERVING, (service, status)
    print(f"image_test: {service} SERVING")
HEALTH
answer=$("$top/.venv/bin/python" "$top/deploy/grpc_call.py" "$address" soloist.v1.InferenceService/Generate \
  '{"text": "Once upon a time", "sampling": {"max_tokens": 16, "temperature": 0}}') || fail "Generate: $answer"
text=$(grep '"delta"' <<<"$answer" | python3 -c "import json, sys; print(''.join(json.loads(l)['delta'].get('text', '') for l in sys.stdin))")
# The same binary outside says the same: libraries and model inside are whole.
expected=$("$scratch/bundle/rootfs/opt/soloist/bin/soloist" generate --model="$root/opt/soloist/models/tiny" --prompt='Once upon a time' \
  --max-tokens=16 --temperature=0 2>/dev/null) || fail "generate outside"
[[ -n $text && $expected == *"$text"* ]] || fail "inside: '$text', outside: '$expected'"
echo "image_test: answered: Once upon a time$text"

# Every process of ours in there: not root, nothing permitted, no new privileges.
checked=0
for process in /proc/[0-9]*; do
  pid=${process#/proc/}
  [[ $(readlink "$process/root" 2>/dev/null) == "$root" ]] || continue
  grep -q '^Uid:.65532.65532.65532.65532$' "/proc/$pid/status" || fail "process $pid: $(grep Uid "/proc/$pid/status")"
  for set in CapPrm CapEff CapAmb; do
    grep -q "^$set:.0000000000000000$" "/proc/$pid/status" || fail "process $pid has capabilities: $(grep $set "/proc/$pid/status")"
  done
  checked=$((checked + 1))
  # Process 1 in there is the entry point, as in a pod: SIGTERM must drain and end it.
  [[ $(awk '/^NSpid:/ {print $NF}' "/proc/$pid/status") != 1 ]] || first=$pid
done
((checked == 3)) || fail "$checked processes inside, expected a leader and two workers"
kill -TERM "${first:?}"
status=0
wait "$server" || status=$?
server=
((status == 0)) || fail "status $status after SIGTERM"
grep -q 'stopped' "$scratch/log" || fail "no 'stopped' in the log"
echo "image_test: $checked processes as 65532 without capabilities; SIGTERM: drained, status 0; passed in $SECONDS s"
