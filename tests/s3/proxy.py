"""A proxy between an S3 client and its server that does what networks and busy stores do."""

import http.client
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Final, Literal

Fault = Literal["drop", "lose-answer", "slow-down", "error", "slow", "cut-upload", "short-upload", "cut-answer"]
FAULTS: Final[tuple[Fault, ...]] = (
    "drop",  # the connection breaks before the server hears anything
    "lose-answer",  # the server does what was asked, and the connection breaks before it says so
    "slow-down",  # 503 SlowDown
    "error",  # 500 InternalError
    "slow",  # the answer takes its time
    "cut-upload",  # the connection breaks in the middle of the body
    "short-upload",  # the server takes half a body for the whole, and says that all is well
    "cut-answer",  # the connection breaks in the middle of the answer
)
SLOW_SECONDS: Final = 0.3
_ANSWERS: Final = {
    "slow-down": (503, b"<Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>"),
    "error": (500, b"<Error><Code>InternalError</Code><Message>We encountered an internal error.</Message></Error>"),
}

Choose = Callable[[str, str], Fault | None]


class FaultyProxy:
    """Listens on a port of its own; ``choose(method, path)`` says which fault strikes a request, if any."""

    def __init__(self, upstream_port: int, choose: Choose) -> None:
        self.choose = choose
        self.struck: list[tuple[str, str, Fault]] = []
        self.num_requests = 0
        proxy = self

        class Handler(_Handler):
            owner = proxy
            upstream = upstream_port

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> "FaultyProxy":
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._server.shutdown()
        self._server.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # else each answer waits 40 ms for an acknowledgement
    owner: FaultyProxy
    upstream: int

    def log_message(self, *arguments: Any) -> None:
        pass

    def _serve(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.owner.num_requests += 1
        fault = self.owner.choose(self.command, self.path)
        if fault is not None:
            self.owner.struck.append((self.command, self.path, fault))
        if fault == "drop":
            self.close_connection = True
            return
        if fault in ("slow-down", "error"):
            self._answer(*_ANSWERS[fault], {})
            return
        if fault == "slow":
            time.sleep(SLOW_SECONDS)
        answer = self._forward(body, fault)
        if answer is None or fault == "lose-answer":
            self.close_connection = True
            return
        status, content, headers = answer
        self._answer(status, content, headers, cut=fault == "cut-answer")

    do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = _serve

    def _forward(self, body: bytes, fault: Fault | None) -> tuple[int, bytes, dict[str, str]] | None:
        connection = http.client.HTTPConnection("127.0.0.1", self.upstream, timeout=60)
        connection.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
        part = body[: len(body) // 2] if fault in ("short-upload", "cut-upload") else body
        for name, value in self.headers.items():
            if name.lower() not in ("expect", "connection", "content-length"):
                connection.putheader(name, value)
        if "Content-Length" in self.headers:
            connection.putheader("Content-Length", str(len(part if fault == "short-upload" else body)))
        try:
            connection.endheaders(part)
            if fault == "cut-upload":
                return None
            response = connection.getresponse()
            return response.status, response.read(), dict(response.getheaders())
        except (OSError, http.client.HTTPException):
            return None  # the server is down: so is this connection
        finally:
            connection.close()

    def _answer(self, status: int, content: bytes, headers: dict[str, str], *, cut: bool = False) -> None:
        self.send_response_only(status)
        for name, value in headers.items():
            if name.lower() not in ("connection", "transfer-encoding", "content-length"):
                self.send_header(name, value)
        length = next((value for name, value in headers.items() if name.lower() == "content-length"), None)
        self.send_header("Content-Length", length if self.command == "HEAD" and length else str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content[: len(content) // 2] if cut else content)
        if cut:
            self.close_connection = True
