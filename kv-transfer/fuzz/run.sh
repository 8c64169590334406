#!/usr/bin/env bash
# Runs the fuzz targets, each for so many seconds (30), with one job each. What is found lies in target/fuzz/found; to see it
# again: kv-transfer/fuzz/run.sh again TARGET FILE
# Needs cargo-fuzz (`cargo install cargo-fuzz --locked`) and a C++ compiler, no nightly toolchain.
set -euo pipefail
cd "$(dirname "$0")/../.."
export RUSTC_BOOTSTRAP=1
PATH="$PWD/target/tools/bin:$PATH"
export LSAN_OPTIONS="suppressions=$PWD/kv-transfer/fuzz/known-leaks"
arguments=(--fuzz-dir kv-transfer/fuzz --target-dir target/fuzz/build)

if [ "${1:-}" = again ]; then
    exec cargo fuzz run "${arguments[@]}" "$2" "$3"
fi
seconds=${1:-30}
mkdir -p target/fuzz/found target/fuzz/corpus
# The seeds belong to the wire format of today, so they are made, not kept.
# The same selection as the tests, so that nothing is built again.
read -ra hardware <<<"$(tests/hardware.sh)"
BATON_FUZZ_SEEDS="$PWD/target/fuzz/corpus" cargo test --quiet --workspace "${hardware[@]}" --lib --locked fuzzing::tests::seeds_pass
for target in codecs tcp_receiver; do
    echo "== $target: $seconds s"
    cargo fuzz run "${arguments[@]}" "$target" "target/fuzz/corpus/$target" -- \
        -max_total_time="$seconds" -timeout=25 -rss_limit_mb=1024 -max_len=8192 -print_final_stats=1 \
        -artifact_prefix=target/fuzz/found/
done
