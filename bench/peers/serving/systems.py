"""The systems that are compared: how each is started on two cores of one machine, where it listens, how it is stopped.

Each is a context manager that gives the URL of an OpenAI-compatible server. Nothing listens but on loopback. All of a
system's processes are one process group, so that stopping it stops them all.
"""
import contextlib
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import time

START_S = 280


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@contextlib.contextmanager
def group(command, log, env=None, **more):
    process = subprocess.Popen([str(c) for c in command], env={**os.environ, **(env or {})}, stderr=open(log, "w"),
                               start_new_session=True, **more)
    try:
        yield process
    finally:
        for sig, patience in ((signal.SIGTERM, 20), (signal.SIGKILL, 5)):
            if process.poll() is None:
                os.killpg(process.pid, sig)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(patience)


def wait_healthy(port, processes):
    until = time.monotonic() + START_S
    while True:
        with contextlib.suppress(OSError, http.client.HTTPException):
            c = http.client.HTTPConnection("127.0.0.1", port, timeout=2)
            c.request("GET", "/health")
            if c.getresponse().status == 200:
                return
        if any(p.poll() is not None for p in processes):
            raise RuntimeError("a server ended while it started: see its log")
        if time.monotonic() > until:
            raise RuntimeError(f"a server did not start within {START_S} s")
        time.sleep(0.3)


@contextlib.contextmanager
def baton(o, log, prefill, decode, threads, *more):
    command = [o.baton, "up", "--prefill", prefill, "--decode", decode, "--threads", threads, "--model", o.model,
               "--http-listen", "127.0.0.1:0", "--grpc-listen", "127.0.0.1:0", "--json", "--log-filter", "warn",
               *(f"--node-flag={flag}" for flag in o.node_flag), *more]
    with group(command, log, stdout=subprocess.PIPE, text=True) as process:
        line = process.stdout.readline()
        if not line.startswith("{"):
            raise RuntimeError(f"`baton up` did not start: see {log}")
        yield "http://" + json.loads(line)["http"].removeprefix("http://")


@contextlib.contextmanager
def llama_server(o, log):
    port = free_port()
    command = [os.path.join(o.llama, "llama-server"), "-m", o.model, "-t", 2, "-np", 8, "-cb", "-c", 16384, "-fa", "off",
               "--host", "127.0.0.1", "--port", port]
    with group(command, log, stdout=subprocess.DEVNULL) as process:
        wait_healthy(port, [process])
        yield f"http://127.0.0.1:{port}"


def vllm_command(o, port, connector):
    command = [o.vllm, "-m", "vllm.entrypoints.openai.api_server", "--model", o.hf, "--served-model-name", "m", "--host",
               "127.0.0.1", "--port", port, "--dtype", "bfloat16", "--enforce-eager", "--max-model-len", 4096]
    if connector:
        command += ["--kv-transfer-config", json.dumps({"kv_connector": "NixlConnector", "kv_role": "kv_both",
                                                        "kv_buffer_device": "cpu"})]
    return command


def vllm_env(cores, side=None):
    env = {"VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1",
           "VLLM_CPU_OMP_THREADS_BIND": cores, "VLLM_LOGGING_LEVEL": "WARNING"}
    if side:
        env |= {"VLLM_NIXL_SIDE_CHANNEL_HOST": "127.0.0.1", "VLLM_NIXL_SIDE_CHANNEL_PORT": str(side)}
    return env


@contextlib.contextmanager
def vllm_alone(o, log):
    port = free_port()
    with group(vllm_command(o, port, False), log, vllm_env("0-1"), stdout=subprocess.DEVNULL) as process:
        wait_healthy(port, [process])
        yield f"http://127.0.0.1:{port}"


@contextlib.contextmanager
def vllm_pair(o, log):
    """A prefill and a decode server of one core each, and a proxy that sends each request to one after the other."""
    p, d, proxy = free_port(), free_port(), free_port()
    with contextlib.ExitStack() as stack:
        servers = [stack.enter_context(group(vllm_command(o, port, True), f"{log}.{core}", vllm_env(str(core), free_port()),
                                             stdout=subprocess.DEVNULL)) for core, port in enumerate((p, d))]
        for port in (p, d):
            wait_healthy(port, servers)
        here = os.path.dirname(os.path.abspath(__file__))
        front = [sys.executable, os.path.join(here, "nixl_proxy.py"), p, d, proxy]
        servers.append(stack.enter_context(group(front, f"{log}.proxy", stdout=subprocess.DEVNULL)))
        wait_healthy(proxy, servers)
        yield f"http://127.0.0.1:{proxy}"


SYSTEMS = {
    "baton-1p1d": lambda o, log: baton(o, log, 1, 1, 1),
    "baton-1p1d-pinned": lambda o, log: baton(o, log, 1, 1, 1, "--pin"),
    "baton-colocated": lambda o, log: baton(o, log, 0, 1, 2),
    "llama-server": llama_server,
    "vllm": vllm_alone,
    "vllm-1p1d-nixl": vllm_pair,
}
