#!/usr/bin/env bash
# Builds an image without a daemon and without touching the user's own image storage:
#   build.sh cpu|cuda OUT.tar      an OCI archive (skopeo copy oci-archive:OUT.tar docker://..., podman load -i OUT.tar)
# Needs mmdebstrap and buildah (third_party/install.sh has them), as root, and a Debian mirror.
# Variables:
#   BUNDLE=FILE.tar.gz   a bundle that is built already; default: `bazel build //deploy:bundle`
#   BASE=IMAGE           what the image starts from, see Containerfile; default: scratch with a minimal Debian 12 root
#   CUDA_LIBRARIES=DIR   cuda: copies CUDA's run-time libraries from there into the image (gigabytes); default: they come
#                        with BASE or are mounted at /usr/local/cuda/lib64 (the images' LD_LIBRARY_PATH)
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
top=$(cd "$here/../.." && pwd)
variant=${1-}
out=${2-}
if [[ $# -ne 2 || ($variant != cpu && $variant != cuda) ]]; then
  echo "usage: build.sh cpu|cuda OUT.tar" >&2
  exit 2
fi
for tool in buildah mmdebstrap; do
  command -v "$tool" >/dev/null || { echo "build.sh: $tool is missing: third_party/install.sh installs it" >&2; exit 1; }
done

bundle=${BUNDLE-}
if [[ -z $bundle ]]; then
  config=()
  [[ $variant == cuda ]] && config=(--config=cuda)
  (cd "$top" && bazel build "${config[@]}" --noshow_progress --ui_event_filters=-info //deploy:bundle)
  bundle=$(cd "$top" && bazel info "${config[@]}" bazel-bin 2>/dev/null)/deploy/soloist.tar.gz
fi
version=$(sed -n 's/.*kVersion\[\] = "\(.*\)".*/\1/p' "$top/server/version.h")
revision=$(git -C "$top" rev-parse HEAD)
[[ -z $(git -C "$top" status --porcelain --untracked-files=no) ]] || revision=$revision-modified
# Files and image carry the commit's time, so that the same sources give the same layers.
SOURCE_DATE_EPOCH=$(git -C "$top" log -1 --format=%ct)
export SOURCE_DATE_EPOCH

scratch=$(mktemp -d)
store=(--root "$scratch/storage" --runroot "$scratch/run" --storage-driver vfs)
trap 'rm -rf "$scratch"' EXIT
context=$scratch/context
mkdir -p "$context/cuda"
cp "$bundle" "$context/soloist.tar.gz"

if [[ -z ${BASE-} ]]; then
  # `extract` unpacks the named packages and what they depend on, and runs nothing of them: no dpkg, no shell inside.
  # /dev is the container run time's.
  mmdebstrap --quiet --variant=extract --include=libc6,base-files,netbase,tzdata \
    --dpkgopt='path-exclude=/usr/share/man/*' --dpkgopt='path-exclude=/usr/share/doc/*' \
    --dpkgopt='path-include=/usr/share/doc/*/copyright' bookworm "$scratch/debian.tar"
  mkdir "$scratch/root"
  tar -C "$scratch/root" --exclude='./dev/*' -xf "$scratch/debian.tar"
  rm -rf "$scratch"/root/{boot,home,srv,media,mnt} "$scratch"/root/etc/{apt,dpkg,hostname,resolv.conf} "$scratch"/root/var/{lib/apt,lib/dpkg,cache,log}
else
  mkdir -p "$scratch/root/etc"
fi
mkdir -p "$scratch/root/etc"
printf '%s\n' 'root:x:0:0:root:/root:/nonexistent' 'soloist:x:65532:65532:Soloist:/tmp:/nonexistent' >"$scratch/root/etc/passwd"
printf '%s\n' 'root:x:0:' 'soloist:x:65532:' >"$scratch/root/etc/group"
printf 'hosts: files dns\n' >"$scratch/root/etc/nsswitch.conf"
tar --sort=name --owner=0 --group=0 --numeric-owner --mtime="@$SOURCE_DATE_EPOCH" -C "$scratch/root" -cf "$context/root.tar" .

if [[ -n ${CUDA_LIBRARIES-} ]]; then
  found=0
  for library in "$CUDA_LIBRARIES"/{libcublasLt.so.13,libnccl.so.2,libnvrtc.so.13,libnvrtc-builtins.so.*,libcudnn*.so.9}; do
    [[ -e $library ]] || { echo "build.sh: no $library" >&2; exit 1; }
    cp -L "$library" "$context/cuda/"
    found=$((found + 1))
  done
  echo "build.sh: $found CUDA libraries from $CUDA_LIBRARIES" >&2
fi

buildah "${store[@]}" bud --isolation chroot --quiet --timestamp "$SOURCE_DATE_EPOCH" --format oci --file "$here/Containerfile" \
  --build-arg "BASE=${BASE-scratch}" --build-arg "VERSION=$version" --build-arg "REVISION=$revision" --build-arg "VARIANT=$variant" \
  --tag "soloist:$version-$variant" "$context" >/dev/null
rm -f "$out"
buildah "${store[@]}" push --quiet "soloist:$version-$variant" "oci-archive:$out:soloist:$version-$variant" >/dev/null
echo "build.sh: $out: soloist:$version-$variant, $(stat -c %s "$out") bytes" >&2
