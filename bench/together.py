#!/usr/bin/env python3
"""Do two CPUs of this machine slow each other down when they wake together?

A loop on CPU 0 alone tells what it takes. Then, again and again, loops on CPUs 0 and 1 begin at once after a pause; every other
eight times while idle-priority loops keep both CPUs awake meanwhile (Linux, chrt). Virtual CPUs that share a core take up to
twice as long. Prints how many times as long as alone the loops took.
"""

import argparse
import multiprocessing
import os
import statistics
import subprocess
import time

CPUS = (0, 1)
PAUSE_S = 1.2
BURSTS = 8
PIECES = 20


def work():
    x = 0
    for _ in range(300_000):
        x = (x * 1103515245 + 12345) & 0x7FFFFFFF
    return x


def computes(orders, cpu):
    """Does so many pieces of work as it is told, and tells how long each took."""
    os.sched_setaffinity(0, {cpu})
    while pieces := orders.recv():
        took = []
        for _ in range(pieces):
            began = time.perf_counter()
            work()
            took.append(time.perf_counter() - began)
        orders.send(took)


def told(name, times):
    times.sort()
    slow = sum(t > 1.3 for t in times)
    print(
        f"{name}: {len(times)} loops, mean {statistics.mean(times):.2f}x, median {statistics.median(times):.2f}x, "
        f"p90 {times[len(times) * 9 // 10]:.2f}x, most {times[-1]:.2f}x; more than 1.3x: {slow}"
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=150, help="how long to go on (default: 150)")
    seconds = parser.parse_args().seconds
    if len(os.sched_getaffinity(0).intersection(CPUS)) < len(CPUS):
        parser.error("it takes CPUs 0 and 1")
    workers = []
    for cpu in CPUS:
        mine, theirs = multiprocessing.Pipe()
        multiprocessing.Process(target=computes, args=(theirs, cpu), daemon=True).start()
        workers.append(mine)
    alone = []
    for _ in range(3):
        workers[0].send(10)
        alone.extend(workers[0].recv())
    base = min(alone)
    print(f"alone: {base * 1e3:.1f} ms; going on for {seconds:.0f} s", flush=True)
    times = {False: [], True: []}
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        for awake, found in times.items():
            loops = []
            if awake:
                loop = ["sh", "-c", "while :; do :; done"]
                loops = [subprocess.Popen(["chrt", "--idle", "0", "taskset", "-c", str(cpu), *loop]) for cpu in CPUS]
            try:
                for _ in range(BURSTS):
                    time.sleep(PAUSE_S)
                    for worker in workers:
                        worker.send(PIECES)
                    found.extend(statistics.mean(worker.recv()) / base for worker in workers)
            finally:
                for loop in loops:
                    loop.kill()
                    loop.wait()
    for worker in workers:
        worker.send(0)
    told("both at once, after a pause", times[False])
    told("the same, CPUs kept awake", times[True])


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        pass
