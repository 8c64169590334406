#!/usr/bin/env python3
"""Hand-over of blocks side by side with the peers: interleaved runs on one machine, medians and ratios.

    cargo build --release -p baton-bench --bin transfer
    bench/transfer-compare.py PEERS [--python VENV/bin/python] [--reps 7]

PEERS is the folder with raw.c and the peers' benches. raw.c is compiled with cc. NIXL and Mooncake run where --python has
numpy with nixl-cu12==1.5.1 (--no-deps) or mooncake-transfer-engine-non-cuda==0.3.13.post1. Progress goes to stderr.
"""
import argparse
import collections
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time

SIZES = [4096, 16384, 65536, 262144, 1048576, 4194304]
TOTAL, POOL, ROUNDS, LAT = 256 << 20, 512 << 20, 9, 200
SPIN = "raw-tcp-spin-sndbuf256K"

p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
p.add_argument("peers", help="folder with raw.c, bench_nixl.py, bench_mooncake.py")
p.add_argument("--transfer", default="target/release/transfer", help="our program (default %(default)s)")
p.add_argument("--python", help="a Python that has NIXL and Mooncake; without it they are left out")
p.add_argument("--reps", type=int, default=7, help="repetitions, interleaved (default %(default)s)")
p.add_argument("--sizes", default=",".join(map(str, SIZES)), help="bytes, comma separated (default %(default)s)")
p.add_argument("--only", help="comma separated names; default all")
p.add_argument("--timeout", type=float, default=120, help="seconds for one run of one size (default %(default)s)")
p.add_argument("--json", action="store_true", help="one line of JSON per (peer, size) instead of a table")
a = p.parse_args()
sizes = [int(s) for s in a.sizes.split(",")]


def run(command, env=None):
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True, timeout=a.timeout,
                          env={**os.environ, **(env or {})}, check=False)
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if not lines:
        raise RuntimeError(f"{command[0]} ended with {done.returncode}: {done.stderr.strip()[-300:]}")
    return json.loads(lines[-1])


def raw(exe, mode, size):
    r = run([exe, mode, size, TOTAL, POOL, ROUNDS, 1, LAT, 1, 0], {"RAW_SNDBUF": str(256 << 10)})
    lat, gb = sorted(r["lat"]), TOTAL * len(r["rounds"]) / 1e9
    return {"gbps": statistics.median(TOTAL / x[0] / 1e9 for x in r["rounds"]), "lat_us_p50": lat[len(lat) // 2],
            "cpu_s_per_gb_initiator": sum(x[1] for x in r["rounds"]) / gb,
            "cpu_s_per_gb_target": sum(x[2] for x in r["rounds"]) / gb,
            "other_cores": max(0, sum(x[3] - x[1] - x[2] for x in r["rounds"])) / sum(x[0] for x in r["rounds"]),
            "verified": r["verified"]}


def ours(transport, *more):
    return lambda size: run([a.transfer, "--transport", transport, "--json", "--rounds", ROUNDS, "--lat-iters", LAT,
                             "--block-bytes", size, *more])


def library(script, env, *more):
    command = [a.python, os.path.join(a.peers, script), "--rounds", ROUNDS, "--lat-iters", LAT, *more]
    netns = os.path.join(a.peers, "netns.sh")
    # They listen on every interface: where namespaces can be had, only the loopback one is there.
    netns = [netns] if subprocess.run([netns, "true"], capture_output=True, check=False).returncode == 0 else []
    env = {**env, "BENCH_QUIET_S": "0", "BENCH_LOCK": os.path.join(tempfile.gettempdir(), "transfer-compare.lock")}
    return lambda size: run([*netns, *command, "--sizes", size >> 10], env)


def candidates(exe):
    all_of_them = {
        SPIN: lambda size: raw(exe, "tcp-spin", size),
        "baton-tcp no crc": ours("tcp", "--crc", "off"),
        "baton-tcp": ours("tcp"),
        "raw-shm": lambda size: raw(exe, "shm", size),
        "baton-shm": ours("shm"),
        "raw-memcpy": lambda size: raw(exe, "memcpy", size),
        "baton-memory": ours("memory"),
    }
    if a.python:
        tcp = {"UCX_TLS": "tcp"}
        all_of_them |= {
            "nixl-tcp": library("bench_nixl.py", tcp),
            "nixl-tcp-noprog": library("bench_nixl.py", tcp, "--prog-initiator", "0"),
            "mooncake-tcp": library("bench_mooncake.py", {}),
        }
    names = a.only.split(",") if a.only else list(all_of_them)
    return {name: all_of_them[name] for name in names}


def median(results, name, size, field):
    values = [r[field] for r in results[name, size]]
    return statistics.median(values) if values else math.nan


def table(results, names, field, digits):
    print(f"\n{field:24}" + "".join(f"{size:>10}" for size in sizes))
    for name in names:
        print(f"{name:24}" + "".join(f"{median(results, name, size, field):>10.{digits}f}" for size in sizes))


def ratios(results, of, to, field="gbps"):
    found = [median(results, of, s, field) / max(median(results, t, s, field) for t in to) for s in sizes]
    known = [r for r in found if not math.isnan(r)]
    mean = math.exp(statistics.fmean(map(math.log, known))) if known else math.nan
    print(f"{of + ' / ' + (to[0] if len(to) == 1 else 'best peer'):44}" + "".join(f"{r:>8.2f}" for r in found)
          + f"   geometric mean {mean:.2f}")


def main():
    results, begun = collections.defaultdict(list), time.time()
    with tempfile.TemporaryDirectory() as folder:
        exe = os.path.join(folder, "raw")
        subprocess.run(["cc", "-O2", "-pthread", os.path.join(a.peers, "raw.c"), "-o", exe], check=True)
        runs = candidates(exe)
        for rep in range(a.reps):
            for size in sizes:
                for name, measure in list(runs.items()):
                    print(f"\r{time.time() - begun:5.0f} s  {rep + 1}/{a.reps}  {size:>8}  {name:30}", end="",
                          file=sys.stderr)
                    try:
                        results[name, size].append(measure(size))
                    except (RuntimeError, subprocess.TimeoutExpired, KeyError) as error:
                        print(f"\n{name}, {size}: {error}", file=sys.stderr)
    print(file=sys.stderr)
    if a.json:
        for (name, size), got in results.items():
            fields = ["gbps", "lat_us_p50", "cpu_s_per_gb_initiator", "cpu_s_per_gb_target"]
            medians = {field: round(median(results, name, size, field), 3) for field in fields}
            print(json.dumps({"peer": name, "block": size, "reps": len(got), **medians,
                              "verified": all(r["verified"] for r in got)}))
        return
    wrong = [key for key, got in results.items() if not all(r["verified"] for r in got)]
    noise = statistics.median(r["other_cores"] for got in results.values() for r in got)
    print(f"medians of {a.reps} interleaved runs; cores used by others meanwhile (median) {noise:.2f}; "
          f"bytes compared: {'WRONG: ' + str(wrong) if wrong else 'right'}")
    for field, digits in [("gbps", 2), ("lat_us_p50", 1), ("cpu_s_per_gb_initiator", 3), ("cpu_s_per_gb_target", 3)]:
        table(results, runs, field, digits)
    print()
    for of in ("baton-tcp no crc", "baton-tcp"):
        ratios(results, of, [SPIN])
    ratios(results, "baton-shm", ["raw-shm"])
    peers = [name for name in runs if name.startswith(("nixl", "mooncake"))]
    if peers:
        ratios(results, "baton-tcp", peers)
    for field in ("cpu_s_per_gb_initiator", "cpu_s_per_gb_target"):
        print(field)
        ratios(results, "baton-tcp", [SPIN], field)


main()
