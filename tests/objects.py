"""A real S3 API on loopback (moto's server, a process of its own), and a proxy before it that is slow or fails.

Invariant: nothing here reaches beyond loopback; the keys are made up, and no file of the user's is looked at.
"""

import atexit
import contextlib
import http.client
import os
import re
import subprocess
import sys
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import fsspec

SETTINGS = {
    "AWS_ACCESS_KEY_ID": "testing", "AWS_SECRET_ACCESS_KEY": "a-secret-key", "AWS_DEFAULT_REGION": "us-east-1",
    "AWS_EC2_METADATA_DISABLED": "true", "AWS_CONFIG_FILE": os.devnull, "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
}  # fmt: skip
_SAYS_WHERE = re.compile(r"http://127\.0\.0\.1:(\d+)")


@contextlib.contextmanager
def s3_server():
    """The port of a moto server: one for all tests of this process, for it takes seconds to start."""
    if not _ports:
        _ports.append(_start())
    yield _ports[0]


_ports = []


def _start():
    command = [sys.executable, "-W", "ignore", "-m", "moto.server", "-H", "127.0.0.1", "-p", "0"]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    for line in server.stderr:
        if found := _SAYS_WHERE.search(line):
            break
    drain = threading.Thread(target=server.stderr.read, daemon=True)
    drain.start()
    atexit.register(_stop, server, drain)
    return int(found[1])


def _stop(server, drain):
    for proxy in _proxies.values():
        proxy.__exit__()
    server.terminate()
    server.wait()
    drain.join()
    server.stderr.close()


@contextlib.contextmanager
def environment(port):
    """The settings under which everything here, subprocesses too, finds the server at `port`."""
    new = {**SETTINGS, "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}"}
    before = {name: os.environ.get(name) for name in new}
    os.environ.update(new)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name, None) if value is None else os.environ.update({name: value})


def bucket(port):
    """A fresh bucket: its name, and a filesystem that is not ours to look at it with."""
    fs = plain_fs(port)
    name = f"bucket-{next(_numbers)}"
    fs.mkdir(name)
    return name, fs


_numbers = iter(range(10**6))


def plain_fs(port):
    """s3fs as a user has it."""
    endpoint = f"http://127.0.0.1:{port}"
    return fsspec.filesystem(
        "s3", key="testing", secret="a-secret-key", endpoint_url=endpoint, use_listings_cache=False
    )  # fmt: skip


def put_tree(fs, where, folder):
    """Every file below `folder` as an object below `where`."""
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            fs.pipe_file(f"{where}/{path.relative_to(folder)}", path.read_bytes())


def objects(fs, where):
    """Every object below `where`: relative name -> bytes."""
    return {name[len(where) + 1 :]: fs.cat_file(name) for name in fs.find(where)}


_proxies = {}


@contextlib.contextmanager
def proxied(port, fails=lambda method, path, n: None, together=1):
    """A proxy before the server at `port`: one for all tests, for to connect to another takes half a second."""
    if port not in _proxies:
        _proxies[port] = Proxy(port).__enter__()
    proxy = _proxies[port]
    proxy.behave(fails, together)
    yield proxy
    proxy.fails = lambda method, path, n: None
    with proxy.guard:  # what a client that is gone had asked for is done now or never
        proxy.together = 0
        proxy.guard.notify_all()
        assert proxy.guard.wait_for(lambda: proxy.now == 0, 30)


class Proxy(ThreadingHTTPServer):
    """Passes requests on to moto; counts them, delays them, and answers some with an error instead.

    `fails` is asked with method, path and the number of the request of this method and path, and gives a status or
    None. `most` is the highest number of requests that were in flight at one time; none is answered before `together`
    of them have been, or half a minute is over.
    """

    daemon_threads = True

    def __init__(self, port, fails=lambda method, path, n: None, delay_seconds=0.0, together=1):
        super().__init__(("127.0.0.1", 0), _Pass)
        self.behind, self.delay_seconds, self.guard = port, delay_seconds, threading.Condition()
        self.behave(fails, together)
        self.thread = threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)

    def behave(self, fails=lambda method, path, n: None, together=1):
        """From now on like this, with nothing counted yet."""
        self.fails, self.together = fails, together
        self.seen, self.answered, self.now, self.most = Counter(), Counter(), 0, 0

    def __enter__(self):
        self.thread.start()
        return self

    def __exit__(self, *exc):
        self.shutdown()
        self.thread.join()
        self.server_close()

    @property
    def port(self):
        return self.server_address[1]

    def handle_error(self, request, client_address):
        """A client that hangs up is no news."""

    def began(self, method, path):
        with self.guard:
            self.now += 1
            self.most = max(self.most, self.now)
            self.seen[method, path] += 1
            self.guard.notify_all()
            self.guard.wait_for(lambda: self.most >= self.together, 30)
            return self.fails(method, path, self.seen[method, path])

    def ended(self):
        with self.guard:
            self.now -= 1
            self.guard.notify_all()


class _Pass(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def _pass(self):
        path = self.path.partition("?")[0]
        status = self.server.began(self.command, path)
        try:
            body = self._body()
            time.sleep(self.server.delay_seconds)
            if status is None:
                self._answer(*self._ask(body))
            else:
                code = {503: "SlowDown", 403: "AccessDenied", 500: "InternalError"}[status]
                text = f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>no</Message></Error>"
                self._answer(status, [("Content-Type", "application/xml")], text.encode())
        finally:
            self.server.ended()

    do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = _pass

    def _body(self):
        if self.headers.get("Expect", "").lower() == "100-continue":
            self.send_response_only(100)
            self.end_headers()
        if "chunked" not in self.headers.get("Transfer-Encoding", ""):
            length = int(self.headers.get("Content-Length") or 0)
            body = self.rfile.read(length)
            if len(body) < length:
                raise ConnectionAbortedError("the client died while it sent")
            return body
        body = b""
        while size := int(self.rfile.readline().split(b";")[0], 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def _ask(self, body):
        server = http.client.HTTPConnection("127.0.0.1", self.server.behind)
        headers = {k: v for k, v in self.headers.items() if k.lower() not in ("transfer-encoding", "expect")}
        headers["Content-Length"] = str(len(body))
        server.request(self.command, self.path, body, headers)
        with server.getresponse() as answer:
            told = answer.status, answer.getheaders(), answer.read()
        server.close()
        return told

    def _answer(self, status, headers, body):
        self.server.answered[status] += 1
        self.send_response_only(status)
        length = str(len(body))
        for name, value in headers:
            if name.lower() == "content-length" and self.command == "HEAD":
                length = value
            if name.lower() not in ("content-length", "transfer-encoding", "connection"):
                self.send_header(name, value)
        self.send_header("Content-Length", length)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *args):
        """Say nothing."""
