#!/usr/bin/env bash
# Prints cargo's arguments for the hardware features that can be built here: one selection for build, tests, lint and docs,
# since another would build all dependencies again. Installs what they need, as root or through sudo; says aloud on the
# standard error what is left out, and why.
set -euo pipefail

need=()
command -v cmake >/dev/null 2>&1 || need+=(cmake)
command -v pkg-config >/dev/null 2>&1 || need+=(pkg-config)
# libclang-cpp.so is another library, and comes with clang alone.
libclang=0
for folder in /usr/lib/llvm-*/lib /usr/lib64 /usr/lib/*-linux-gnu; do
    if compgen -G "$folder/libclang.so*" >/dev/null || compgen -G "$folder/libclang-[0-9]*.so*" >/dev/null; then libclang=1; fi
done
[ "$libclang" = 1 ] || need+=(libclang-dev)
[ -f /usr/include/infiniband/verbs.h ] || need+=(libibverbs-dev)
pkg-config --exists libnl-3.0 2>/dev/null || need+=(libnl-3-dev)
pkg-config --exists libnl-route-3.0 2>/dev/null || need+=(libnl-route-3-dev)

root=()
[ "$(id -u)" = 0 ] || root=(sudo -n)
install() {
    command -v apt-get >/dev/null 2>&1 && "${root[@]}" apt-get update -qq >&2 &&
        "${root[@]}" env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "$@" >&2
}
if [ ${#need[@]} -gt 0 ] && ! install "${need[@]}"; then
    echo "hardware.sh: SKIPPED: rdma is neither built nor tested here, because these packages cannot be installed: ${need[*]}" >&2
    exit 0
fi
echo "--features baton/rdma,baton-bench/rdma"
