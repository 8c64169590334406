#!/usr/bin/env bash
# Runs every test of Baton. Installs what it lacks (as root or through sudo), otherwise says what to install.
#   ./test.sh          all tests (at most 15 minutes on 2 cores)
#   ./test.sh --long   the campaigns too: every seed, every prompt, repeated kills
set -euo pipefail
cd "$(dirname "$0")"

long=0
for argument in "$@"; do
    case "$argument" in
        --long) long=1 ;;
        -h | --help) sed -n '2,4p' "$0" | sed 's/^# \{0,1\}//'; exit 0 ;;
        *) echo "test.sh: unknown argument \`$argument\`; only --long is known" >&2; exit 2 ;;
    esac
done

stage_start=$SECONDS
stage_name=
stage() { # name: closes the stage before it and prints its seconds
    if [ -n "$stage_name" ]; then echo "== $stage_name: $((SECONDS - stage_start)) s"; fi
    stage_name=$1
    stage_start=$SECONDS
    if [ -n "$1" ]; then echo "== $1"; fi
}

as_root() {
    if [ "$(id -u)" = 0 ]; then "$@"
    elif command -v sudo >/dev/null 2>&1 && sudo -n true 2>/dev/null; then sudo -n "$@"
    else return 1; fi
}

need=()
command -v etcd >/dev/null 2>&1 || need+=(etcd-server)
command -v ip >/dev/null 2>&1 || need+=(iproute2)
command -v cc >/dev/null 2>&1 || need+=(gcc libc6-dev)
python3 -c 'import venv, ensurepip' >/dev/null 2>&1 || need+=(python3-venv)
if [ ${#need[@]} -gt 0 ]; then
    stage "install ${need[*]}"
    if ! { as_root apt-get update -qq && as_root env DEBIAN_FRONTEND=noninteractive \
        apt-get install -y -qq --no-install-recommends "${need[@]}"; }; then
        echo "test.sh: cannot install packages here; run: sudo apt-get install ${need[*]}" >&2
        exit 1
    fi
fi

if [ "$long" = 1 ] && ! command -v chromium-headless-shell chromium chromium-browser google-chrome >/dev/null 2>&1; then
    stage "install a browser for the planner's page"
    as_root env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends chromium-headless-shell ||
        echo "test.sh: no browser can be installed here: the planner's page is not opened in one" >&2
fi

if ! target/test-venv/bin/python -c 'import openai, grpc_tools, jsonschema' >/dev/null 2>&1; then
    stage "python clients"
    mkdir -p target
    python3 -m venv target/test-venv
    target/test-venv/bin/python -m pip install --quiet --disable-pip-version-check -r tests/python/requirements.txt
fi

stage "hardware"
features=$(tests/hardware.sh)

stage "build"
# One selection of packages and features for build and run: another would build all dependencies again.
# shellcheck disable=SC2086 # words on purpose
cargo build --workspace $features --bins --tests --locked

stage "model"
if [ -f ../shared/models/SmolLM2-135M-Instruct.Q4_1.gguf ]; then
    BATON_TEST_MODEL=$(realpath ../shared/models/SmolLM2-135M-Instruct.Q4_1.gguf)
else
    BATON_TEST_MODEL=$(target/debug/baton model get smollm2 | tail -n 1)
fi
export BATON_TEST_MODEL BATON_TEST_LONG=$long

stage "tests"
# shellcheck disable=SC2086
cargo test --workspace $features --locked --no-fail-fast -- --test-threads 2

if [ "$long" = 1 ]; then
    stage "the real model over rdma"
    status=0
    tests/rdma-guest.sh --cluster "$BATON_TEST_MODEL" || status=$?
    # 77: this machine cannot, and the script has said why.
    [ "$status" = 0 ] || [ "$status" = 77 ]
    stage "fuzz, 600 s each"
    if command -v cargo-fuzz >/dev/null 2>&1 || [ -x target/tools/bin/cargo-fuzz ]; then
        kv-transfer/fuzz/run.sh 600
    else
        echo "test.sh: SKIPPED, there is no cargo-fuzz: cargo install cargo-fuzz --locked --root target/tools" >&2
    fi
fi
stage ""
