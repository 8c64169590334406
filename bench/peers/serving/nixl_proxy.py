#!/usr/bin/env python3
"""Sends each completion to a prefill server, then, with what that said of its KV, to a decode server, whose stream it passes on.

usage: nixl_proxy.py PREFILL_PORT DECODE_PORT LISTEN_PORT      (loopback only)
"""
import http.client
import http.server
import json
import sys

PREFILL, DECODE, LISTEN = map(int, sys.argv[1:4])
NOBODY = {"do_remote_decode": True, "do_remote_prefill": False, "remote_engine_id": None, "remote_block_ids": None,
          "remote_host": None, "remote_port": None}


class Proxy(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def plain(self, status, body):
        self.send_response(status)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self):
        c = http.client.HTTPConnection("127.0.0.1", DECODE, timeout=10)
        c.request("GET", self.path)
        r = c.getresponse()
        self.plain(r.status, r.read())

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        first = {**body, "max_tokens": 1, "stream": False, "kv_transfer_params": NOBODY}
        first.pop("stream_options", None)
        first.pop("min_tokens", None)
        p = http.client.HTTPConnection("127.0.0.1", PREFILL, timeout=300)
        p.request("POST", self.path, json.dumps(first), {"content-type": "application/json"})
        r = p.getresponse()
        answer = r.read()
        p.close()
        if r.status != 200:
            return self.plain(r.status, answer)
        params = json.loads(answer).get("kv_transfer_params")
        d = http.client.HTTPConnection("127.0.0.1", DECODE, timeout=300)
        d.request("POST", self.path, json.dumps({**body, "kv_transfer_params": params}), {"content-type": "application/json"})
        r = d.getresponse()
        self.send_response(r.status)
        self.send_header("content-type", r.headers.get("content-type", "application/json"))
        self.send_header("connection", "close")
        self.end_headers()
        while piece := r.read1(65536):
            self.wfile.write(piece)
            self.wfile.flush()
        d.close()
        self.close_connection = True


http.server.ThreadingHTTPServer.request_queue_size = 128
http.server.ThreadingHTTPServer(("127.0.0.1", LISTEN), Proxy).serve_forever()
