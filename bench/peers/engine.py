#!/usr/bin/env python3
"""The engine beside llama.cpp on this machine: one test after another, by turns, medians and ratios.

    cargo build --release -p baton-bench --bin engine --locked
    bench/peers/engine.py LLAMA_BIN MODEL.gguf [--q4-0 Q4_0.gguf] [--threads 2,1] [--rounds 3]

LLAMA_BIN is the folder with llama-bench, llama-batched-bench and llama-perplexity (built with -march=native). llama.cpp runs
with -fa off, its best for long contexts. --q4-0: the same model requantised to Q4_0, for llama.cpp's faster path; our
side stays on MODEL. A ratio below its aim is marked. Takes some 2 minutes a round and thread count.
"""
import argparse
import json
import os
import pathlib
import re
import statistics
import subprocess
import sys

HERE = pathlib.Path(__file__).resolve().parents[2]
GOLDEN = HERE / "tests/golden"
# (name, prompt, depth, batch, aim against MODEL, aim against Q4_0)
TESTS = [("prefill 512", 512, 0, 1, 4.0, 1.5), ("prefill 2048", 2048, 0, 1, 3.0, 1.5), ("decode, context 0", 0, 0, 1, 1.5, 1.2),
         ("decode, context 1024", 0, 1024, 1, 2.5, 1.2), ("decode, context 4096", 0, 4096, 1, 3.0, 1.2),
         ("decode of 8, context 128", 0, 128, 8, 3.5, 1.2), ("decode of 16, context 128", 0, 128, 16, 4.0, 1.2)]

p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
p.add_argument("llama_bin", type=pathlib.Path)
p.add_argument("model")
p.add_argument("--q4-0", help="llama.cpp's second file")
p.add_argument("--engine", default=HERE / "target/release/engine", help="our program (default %(default)s)")
p.add_argument("--threads", default="2", help="thread counts, comma separated (default %(default)s)")
p.add_argument("--rounds", type=int, default=3, help="rounds by turns (default %(default)s)")
p.add_argument("--tests", default="", help="only tests whose name has this in it")
p.add_argument("--json", action="store_true", help="a line of JSON per test instead of tables")
a = p.parse_args()


def run(command):
    """Standard output and peak memory in MiB."""
    wrap = ("import resource,subprocess,sys;r=subprocess.run(sys.argv[1:]).returncode;"
            "print('PEAK',resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss//1024,file=sys.stderr);sys.exit(r)")
    done = subprocess.run([sys.executable, "-c", wrap, *map(str, command)], capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{command[0]} ended with {done.returncode}: {done.stderr[-400:]}")
    return done.stdout, int(re.findall(r"PEAK (\d+)", done.stderr)[-1]), done.stderr


def ours(threads, test, kv="f16"):
    _, prompt, depth, batch, _, _ = test
    command = [a.engine, "--model", a.model, "--threads", threads, "--repeat", 1, "--kv-dtype", kv, "--json"]
    if prompt:
        command += ["--prompts", prompt, "--depths", 0, "--batches", 0]
    else:
        command += ["--prompts", 0, "--depths", depth, "--batches", batch]
    out, peak, _ = run(command)
    return json.loads(out.splitlines()[-1])["tok_s"], peak


def llama(threads, test, model):
    _, prompt, depth, batch, _, _ = test
    common = ["-m", model, "-t", threads, "-fa", "off"]
    if batch > 1:
        out, peak, _ = run([a.llama_bin / "llama-batched-bench", *common, "-tb", threads, "-c", 8192, "-b", 2048, "-ub", 512, "-npp",
                            depth, "-ntg", 32, "-npl", batch, "--output-format", "jsonl"])
        return json.loads([x for x in out.splitlines() if x.startswith("{")][-1])["speed_tg"], peak
    what = ["-p", prompt, "-n", 0] if prompt else ["-p", 0, "-n", 64]
    out, peak, _ = run([a.llama_bin / "llama-bench", *common, "-ub", 512, "-r", 1, "-o", "jsonl", "-d", depth, *what])
    return json.loads(out.splitlines()[-1])["avg_ts"], peak


def compare(threads):
    tests = [test for test in TESTS if a.tests in test[0]]
    sides = {"ours": lambda t: ours(threads, t), "ours, q8 KV": lambda t: ours(threads, t, "q8"), "llama.cpp": lambda t: llama(threads, t, a.model)}
    if a.q4_0:
        sides["its Q4_0"] = lambda t: llama(threads, t, a.q4_0)
    seen = {(test[0], side): [] for test in tests for side in sides}
    for number in range(a.rounds):
        for test in tests:
            for side, measure in sides.items():
                seen[test[0], side].append(measure(test))
                print(f"round {number + 1}, {threads} threads, {test[0]}, {side}: {seen[test[0], side][-1][0]:.1f} tok/s", file=sys.stderr)
    return tests, sides, seen


def table(threads):
    tests, sides, seen = compare(threads)
    middle = {key: statistics.median(rate for rate, _ in runs) for key, runs in seen.items()}
    peak = {key: max(mib for _, mib in runs) for key, runs in seen.items()}
    print(f"\n{threads} threads, medians of {a.rounds} rounds by turns; load {os.getloadavg()[0]:.1f}\n")
    print("| test | ours | q8 KV | to f16 | llama.cpp | ratio (range) | aim | its Q4_0 | ratio | aim | peak MiB, ours / its |\n" + "|---" * 11 + "|")
    for name, *_, aim, aim_q4 in tests:
        us, q8, them, q4 = (middle.get((name, side)) for side in ["ours", "ours, q8 KV", "llama.cpp", "its Q4_0"])
        pairs = [x[0] / y[0] for x, y in zip(seen[name, "ours"], seen[name, "llama.cpp"])]
        mark = lambda ratio, aim: f"{ratio:.2f}x" + ("" if ratio >= aim else " (missed)")
        other = f"{q4:.1f} | {mark(us / q4, aim_q4)}" if q4 else "- | -"
        line = {"test": name, "threads": threads, "ours": us, "q8": q8, "llama": them, "llama_q4_0": q4, "ratio": us / them, "aim": aim,
                "peak_mib": [peak[name, "ours"], peak[name, "llama.cpp"]]}
        print(json.dumps(line) if a.json else
              f"| {name} | {us:.1f} | {q8:.1f} | {q8 / us:.2f}x | {them:.1f} | {mark(us / them, aim)} ({min(pairs):.2f} to {max(pairs):.2f}) | {aim}x"
              f" | {other} | {aim_q4}x | {line['peak_mib'][0]} / {line['peak_mib'][1]} |", flush=True)


def perplexity():
    """Of the same 1,536 tokens, counted in the same way."""
    out, _, _ = run([a.engine, "--model", a.model, "--perplexity", GOLDEN / "engine_logits.json", "--json"])
    us = json.loads(out.splitlines()[-1])["perplexity"]
    out, _, err = run([a.llama_bin / "llama-perplexity", "-m", a.model, "-t", a.threads.split(",")[0], "-fa", "off", "-c", 512, "-b", 512, "-f",
                       GOLDEN / "engine_text.txt", "--chunks", 3])
    them = float(re.findall(r"Final estimate: PPL = ([0-9.]+)", out + err)[-1])
    print(f"\nperplexity, windows of 512: ours {us:.4f}, llama.cpp {them:.4f}, ours {100 * (us / them - 1):+.3f}% (aim within 0.5%)")


for count in a.threads.split(","):
    table(count)
if not a.tests:
    perplexity()
