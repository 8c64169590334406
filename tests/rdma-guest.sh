#!/usr/bin/env bash
# Tests RDMA through real verbs where there is no RDMA hardware: boots Debian's kernel in QEMU (software emulation, no KVM,
# nothing of RDMA in the host's kernel) with two soft-RoCE devices, rxe0 (10.99.0.1) and rxe1 (10.99.0.2), joined by a wire.
#
#   tests/rdma-guest.sh                        builds and runs the rdma part of the conformance suite and its link cuts, then
#                                              a whole cluster that hands over by rdma and loses its link in mid hand-over
#   tests/rdma-guest.sh --cluster [MODEL]      the cluster alone; with MODEL, a .gguf file, that model and no cuts (2 GiB, long)
#   tests/rdma-guest.sh --bench                our transfer program against ib_write_bw; prints ratios, asserts nothing
#   tests/rdma-guest.sh --run SCRIPT [FILE...] any script, run in the guest as root by dash, once the devices are up
#
# With --run each FILE of the host is in the guest's PATH (/tools) under its own name, stripped; an ELF file's shared
# libraries come along. SCRIPT may source /tools/link.sh for `link_cut near|far|silent` and `link_heal`. Its exit status is
# that of this program. Everything else the guest needs (a model, a configuration) is a FILE too.
#
# Exit status: 0 passed; 77 this host cannot run it (why is said); 124 the guest ran past its time; 125 it never answered;
# anything else: that many failed steps, or the script's own status.
#
# Environment: RDMA_GUEST_MEMORY_MIB (1024; at most 2048), RDMA_GUEST_CPUS (2), RDMA_GUEST_SECONDS (300; with --bench 900),
#   RDMA_GUEST_BUILD (what to hand to cargo instead of the workspace with all its hardware features),
#   RDMA_GUEST_TESTS (names of tests, instead of all of the suite).
# Installs Debian packages (as root or through sudo) and keeps the kernel in target/rdma-guest/.
set -euo pipefail
cd "$(dirname "$0")/.."
here=tests/rdma-guest
cache=target/rdma-guest
mkdir -p "$cache"
work=$(mktemp -d)
qemu=
cleanup() {
    if [ -n "$qemu" ]; then kill "$qemu" 2>/dev/null || true; fi
    rm -rf "$work"
}
trap cleanup EXIT

last=$SECONDS
lap() { echo "rdma-guest: $1: $((SECONDS - last)) s"; last=$SECONDS; }
cannot() { echo "rdma-guest: SKIPPED, rdma is not tested on this host: $1" >&2; exit 77; }

mode=suite
case "${1:-}" in
    "") ;;
    --bench) mode=bench; shift ;;
    --cluster) mode=cluster; shift ;;
    --run) mode=run; shift; [ $# -gt 0 ] || { echo "rdma-guest: --run needs a script" >&2; exit 2; } ;;
    -h | --help) sed -n '2,20p' "$0" | sed 's/^# \{0,1\}//'; exit 0 ;;
    *) echo "rdma-guest: unknown argument \`$1\`" >&2; exit 2 ;;
esac

as_root() {
    if [ "$(id -u)" = 0 ]; then "$@"
    elif command -v sudo >/dev/null 2>&1 && sudo -n true 2>/dev/null; then sudo -n "$@"
    else return 1; fi
}

# 1. packages of the host
[ "$(uname -m)" = x86_64 ] || cannot "the guest is an x86_64 machine, this one is $(uname -m)"
command -v apt-get >/dev/null && command -v dpkg-deb >/dev/null || cannot "it takes its kernel and tools from Debian packages"
need=()
want() { command -v "$1" >/dev/null 2>&1 || need+=("$2"); }
want qemu-system-x86_64 qemu-system-x86
want dash dash
want cpio cpio
want modprobe kmod
want ip iproute2
want rdma iproute2
want ibv_devinfo ibverbs-utils
want ib_write_bw perftest
[ -x /bin/busybox ] && ! ldd /bin/busybox >/dev/null 2>&1 || need+=(busybox-static)
ls /usr/lib/*/libibverbs/librxe-*.so >/dev/null 2>&1 || need+=(libibverbs1 ibverbs-providers)
kernel_of_apt() { apt-cache depends linux-image-amd64 2>/dev/null | sed -n 's/.*Depends: linux-image-\([0-9].*\)/\1/p' | head -n 1; }
kernel=$(find "$cache" -maxdepth 2 -name vmlinuz -printf '%h\n' 2>/dev/null | head -n 1)
if [ ${#need[@]} -gt 0 ] || { [ -z "$kernel" ] && [ -z "$(kernel_of_apt)" ]; }; then
    as_root apt-get update -qq || cannot "apt-get update failed; it needs root and a package mirror"
fi
if [ ${#need[@]} -gt 0 ]; then
    as_root env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${need[@]}" >/dev/null ||
        cannot "cannot install ${need[*]}"
fi
lap "packages (${need[*]:-all there})"

# 2. the kernel and the modules it needs, unpacked only so far: installing the package would run its hooks
if [ -z "$kernel" ]; then
    release=$(kernel_of_apt)
    [ -n "$release" ] || cannot "there is no package linux-image-amd64 (the cloud kernel has no soft-RoCE)"
    (cd "$work" && apt-get download -q "linux-image-$release" >/dev/null 2>&1) || cannot "cannot download linux-image-$release"
    mkdir -p "$work/kernel" "$cache"
    dpkg-deb --fsys-tarfile "$work"/linux-image-*.deb | tar -x -C "$work/kernel" --wildcards \
        './boot/vmlinuz*' './lib/modules/*/modules.*' './lib/modules/*/kernel/drivers/infiniband/core/*' \
        './lib/modules/*/kernel/drivers/infiniband/sw/rxe/*' './lib/modules/*/kernel/drivers/net/veth.ko*' \
        './lib/modules/*/kernel/net/ipv[46]/*udp_tunnel.ko*' './lib/modules/*/kernel/crypto/crc32*' \
        './lib/modules/*/kernel/net/sched/sch_netem.ko*' './lib/modules/*/kernel/fs/configfs/*'
    depmod -b "$work/kernel" "$release" 2>/dev/null
    mv "$work/kernel/boot/vmlinuz-$release" "$work/kernel/vmlinuz"
    kernel=$cache/$release
    rm -rf "$kernel.new" && mv "$work/kernel" "$kernel.new" && mv "$kernel.new" "$kernel"
fi
release=$(basename "$kernel")
lap "kernel $release"

# 3. what runs in the guest
script=$here/suite
files=()
guest_model=
select_build() {
    hardware=$(tests/hardware.sh)
    [ -n "$hardware" ] || cannot "the rdma feature cannot be built"
    read -ra build <<<"${RDMA_GUEST_BUILD:---workspace $hardware}"
}
add_cluster() { # the programs of the cluster, among the files
    select_build
    CARGO_INCREMENTAL=0 cargo build "${build[@]}" --bins --tests --locked
    files+=("${CARGO_TARGET_DIR:-target}"/debug/{baton,handover-cluster})
}
case "$mode" in
    run) script=$1; shift; files=("$@") ;;
    suite)
        select_build
        suite=$(CARGO_INCREMENTAL=0 cargo test "${build[@]}" --no-run --locked --message-format json 2>"$work/cargo" |
            sed -n 's/.*"target":{[^}]*"name":"conformance".*"executable":"\([^"]*\)".*/\1/p' | tail -n 1)
        [ -x "$suite" ] || { cat "$work/cargo" >&2; echo "rdma-guest: the suite does not build" >&2; exit 1; }
        cp "$suite" "$work/conformance"
        files=("$work/conformance")
        add_cluster
        files+=("$here/cluster")
        ;;
    cluster)
        add_cluster
        script=$here/cluster
        if [ $# -gt 0 ]; then
            files+=("$1")
            guest_model=$(basename "$1")
            RDMA_GUEST_MEMORY_MIB=${RDMA_GUEST_MEMORY_MIB:-2048} RDMA_GUEST_SECONDS=${RDMA_GUEST_SECONDS:-3600}
        fi
        ;;
    bench)
        cargo build --release --locked -p baton-bench --bin transfer --features rdma
        script=$here/bench
        RDMA_GUEST_SECONDS=${RDMA_GUEST_SECONDS:-900}
        files=(target/release/transfer)
        ;;
esac
[ "$mode" = run ] || lap "build"

# 4. the initramfs: shell, network and verbs tools, the files, and the libraries of all of them
root=$work/root
mkdir -p "$root"/{bin,sbin,proc,sys,dev,tmp,run,tools,lib/modules,etc/libibverbs.d}
put() { mkdir -p "$root$(dirname "$2")"; cp -L "$1" "$root$2"; }
libraries() { { ldd "$1" 2>/dev/null | grep -oE '/[^ ]+' || true; } | while read -r l; do [ -e "$root$l" ] || put "$l" "$l"; done; }
put /bin/busybox /bin/busybox
# dash, because busybox's shell prefers its own applets, and its `ip` knows no veth
put "$(command -v dash)" /bin/sh
libraries "$(command -v dash)"
for tool in ip tc rdma ibv_devinfo ib_write_bw ib_write_lat; do
    path=$(command -v "$tool")
    put "$path" "/tools/$tool"
    libraries "$path"
done
for file in ${files[@]+"${files[@]}"}; do
    name=$(basename "$file")
    put "$file" "/tools/$name"
    libraries "$file"
    strip "$root/tools/$name" 2>/dev/null || true
done
[ "$mode" = run ] || chmod +x "$root"/tools/*
# libibverbs loads its provider at run time, so that ldd does not name it
put /etc/libibverbs.d/rxe.driver /etc/libibverbs.d/rxe.driver
for provider in /usr/lib/*/libibverbs/librxe-*.so; do put "$provider" "$provider"; libraries "$provider"; done
# modules in the order of loading; rxe asks for crc32 at run time, so nothing else names it
for module in crc32_generic veth sch_netem ib_uverbs rdma_ucm rdma_rxe; do
    modprobe -d "$kernel" -S "$release" --show-depends "$module" | awk '$1 == "insmod" { print $2 }'
done | awk '!seen[$0]++' >"$work/modules"
while read -r module; do cp "$module" "$root/lib/modules/"; basename "$module"; done <"$work/modules" >"$root/lib/modules/order"
cp "$here/init" "$root/init"
cp "$here/link.sh" "$root/tools/link.sh"
cp "$script" "$root/script"
printf "RDMA_GUEST_TESTS='%s'\nRDMA_GUEST_MODEL='%s'\n" "${RDMA_GUEST_TESTS:-}" "$guest_model" >"$root/tools/environment"
chmod +x "$root/init" "$root/script"
(cd "$root" && find . | cpio -o -H newc --quiet) >"$work/initramfs" # uncompressed: the guest unpacks slowly
lap "initramfs ($(du -m "$work/initramfs" | cut -f1) MiB)"

# 5. boot
log=$work/console
: >"$log"
timeout "${RDMA_GUEST_SECONDS:-300}" qemu-system-x86_64 -M q35 -accel tcg,thread=multi -cpu max \
    -m "${RDMA_GUEST_MEMORY_MIB:-1024}" -smp "${RDMA_GUEST_CPUS:-2}" \
    -nodefaults -display none -no-reboot -monitor none -serial stdio -kernel "$kernel/vmlinuz" -initrd "$work/initramfs" \
    -append "console=ttyS0 quiet loglevel=4 panic=-1 mitigations=off nokaslr audit=0 no_timer_check tsc=unstable clocksource=hpet" \
    </dev/null >"$log" 2>&1 &
qemu=$!
tail -n +1 -f --pid="$qemu" -s 0.2 "$log" | sed -u 's/\r$//; s/^/  | /'
status=0
wait "$qemu" || status=$?
qemu=
lap "guest"
if [ "$status" = 124 ]; then
    echo "rdma-guest: the guest ran past ${RDMA_GUEST_SECONDS:-300} s" >&2
    exit 124
fi
answer=$(tr -d '\r' <"$log" | sed -n 's/^guest: status \([0-9][0-9]*\)$/\1/p' | tail -n 1)
if [ -z "$answer" ]; then echo "rdma-guest: the guest ended without an answer (qemu: $status)" >&2; exit 125; fi
if [ "$answer" = 0 ]; then echo "rdma-guest: passed"; else echo "rdma-guest: FAILED ($answer)" >&2; fi
exit "$answer"
