#!/usr/bin/env python3
"""Whole servers side by side on two cores: each is started alone, measured from outside, stopped; by turns, for several rounds.

    cargo build --release -p baton -p baton-bench --bin baton --bin serve
    bench/peers/serving/compare.py goodput --model F.gguf [--trace FILE] [--llama DIR] [--vllm PYTHON --hf DIR]
    bench/peers/serving/compare.py interference --model F.gguf --rounds 5 --only baton-1p1d,baton-colocated,llama-server

--llama is the folder of llama-server. --vllm is the Python of an environment that has vLLM for CPUs with NIXL, --hf the
same model as safetensors. What is not given is left out, aloud. Lines of JSON on standard output, a table at the end.
"""
import argparse
import collections
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile

from systems import SYSTEMS

p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
p.add_argument("what", choices=["goodput", "interference"])
p.add_argument("--model", required=True, help="GGUF file")
p.add_argument("--baton", default="target/release/baton")
p.add_argument("--serve", default="target/release/serve")
p.add_argument("--llama", help="folder of llama-server")
p.add_argument("--vllm", help="Python with vLLM")
p.add_argument("--hf", help="folder of the same model as safetensors")
p.add_argument("--node-flag", action="append", default=[], help="passed to `baton up`, e.g. --node-flag=--speculation=off")
p.add_argument("--trace", help="goodput: a trace instead of the mixed workload")
p.add_argument("--only", help="comma separated names; default all: " + ", ".join(SYSTEMS))
p.add_argument("--rounds", type=int, default=1)
p.add_argument("--logs", default=tempfile.mkdtemp(prefix="serving-"), help="folder for the servers' logs")
p.epilog = "What stands behind -- goes to `serve goodput` or `serve interference`."
cut = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
a = p.parse_args(sys.argv[1:cut])
a.rest = sys.argv[cut + 1:]

names = a.only.split(",") if a.only else list(SYSTEMS)
for name in list(names):
    lacks = name == "llama-server" and not a.llama or name.startswith("vllm") and not (a.vllm and a.hf)
    if lacks:
        print(f"{name}: SKIPPED, where it is was not said", file=sys.stderr)
        names.remove(name)

# Ended from outside, it still stops the server that it started.
signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))

found = collections.defaultdict(list)
for turn in range(a.rounds):
    for name in names:
        try:
            with SYSTEMS[name](a, os.path.join(a.logs, f"{name}.{turn}")) as url:
                command = [a.serve, a.what, "--target", url, "--name", name, "--seed", str(turn + 1), "--json", *a.rest]
                if a.trace:
                    command += ["--workload", a.trace]
                done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
                sys.stdout.write(done.stdout)
                sys.stdout.flush()
                found[name].append(json.loads(done.stdout.splitlines()[-1]))
        except (RuntimeError, subprocess.CalledProcessError) as error:
            print(f"{name}: FAILED: {error}; logs in {a.logs}", file=sys.stderr)


def median(values):
    return statistics.median(v for v in values)


if a.what == "goodput":
    print("| | requests/s within the SLO, median | by round |\n|---|---|---|")
    for name, rows in found.items():
        # With --rate nothing was searched: the share of good requests is in the lines above.
        rates = [row["goodput_rate"] for row in rows if "goodput_rate" in row]
        if not rates:
            continue
        print(f"| {name} | {median(rates):.2f} | {', '.join(f'{r:.2f}' for r in rates)} |")
else:
    print("| ms, medians of rounds (largest for max) | gaps | p50 | p99 | p99.9 | max | p99 to alone | p99.9 to alone |")
    print("|---|---|---|---|---|---|---|---|")
    for name, rows in found.items():
        for kind in ("token", "piece"):
            for phase in ("alone", "beside"):
                of = lambda key, phase=phase: 1e3 * median(row[phase][kind][key] for row in rows)
                ratio = lambda key: median(row["beside"][kind][key] / row["alone"][kind][key] for row in rows)
                tail = f"{ratio('p99'):.2f} | {ratio('p999'):.2f}" if phase == "beside" else " | "
                count = int(median(row[phase][kind]["count"] for row in rows))
                most = 1e3 * max(row[phase][kind]["max"] for row in rows)
                print(f"| {name}, {kind}s, {phase} | {count} | {of('p50'):.1f} | {of('p99'):.1f} | {of('p999'):.1f} | {most:.1f} | {tail} |")
