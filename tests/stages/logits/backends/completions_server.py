"""A small server of ``/v1/completions`` with prompt logprobs in vLLM's layout, which fails in the ways that servers do."""

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np
import torch

from stages.models.config import ModelConfig, load_model

Fault = Callable[["Exchange"], None]


@dataclass
class Exchange:
    """One request, and the answer that will be sent."""

    path: str
    request: dict[str, Any]
    headers: dict[str, str]
    status: int = 200
    answer: Any = None
    answer_headers: dict[str, str] = field(default_factory=dict)
    body: bytes | None = None  # in place of the answer
    promised_bytes: int | None = None  # as the length of the body


class CompletionsServer:
    """Serves one tiny model.

    Attributes:
        names: what it says it serves.
        max_model_len: what it says is the most tokens of a request.
        max_logprobs: more are refused.
        key: what requests must bring; None: nothing.
        faults: what goes wrong with the next completions, one each; afterwards nothing does.
        always: what goes wrong with every completion.
        exchanges: every completion that was asked for.
        most_at_once: requests that were under way at the same time, at most.
    """

    def __init__(self, folder: Any, *, max_model_len: int | None = None) -> None:
        self.names = ["tiny"]
        self.max_model_len = max_model_len
        self.max_logprobs = 100
        self.key: str | None = None
        self.faults: list[Fault] = []
        self.always: Fault | None = None
        self.exchanges: list[Exchange] = []
        self.most_at_once = 0
        self._under_way = 0
        self._lock = threading.Lock()
        self._model = load_model(
            ModelConfig(name="served", path=folder), dtype="float32", attention=("eager",), device="cpu"
        )

    def answer(self, exchange: Exchange) -> None:
        """Fill in the answer."""
        if self.key is not None and exchange.headers.get("Authorization") != f"Bearer {self.key}":
            exchange.status, exchange.answer = 401, {"error": {"message": "Unauthorized"}}
        elif exchange.path == "/v1/models":
            limit = {} if self.max_model_len is None else {"max_model_len": self.max_model_len}
            exchange.answer = {"object": "list", "data": [{"id": name, **limit} for name in self.names]}
        elif exchange.path == "/version":
            exchange.answer = {"version": "0.0.fake"}
        elif exchange.path == "/v1/completions":
            self._complete(exchange)
        else:
            exchange.status, exchange.answer = 404, {"detail": "Not Found"}

    def _complete(self, exchange: Exchange) -> None:
        with self._lock:
            self.exchanges.append(exchange)
            fault = self.faults.pop(0) if self.faults else self.always
        width, prompt = exchange.request["prompt_logprobs"], exchange.request["prompt"]
        if width > self.max_logprobs:
            message = f"Requested prompt logprobs of {width}, which is greater than max allowed: {self.max_logprobs}"
            exchange.status, exchange.answer = 400, {"error": {"message": message}}
            return
        if self.max_model_len is not None and len(prompt) + exchange.request["max_tokens"] > self.max_model_len:
            exchange.status, exchange.answer = 400, {"error": {"message": "this model's maximum context length"}}
            return
        with torch.inference_mode():
            logprobs = self._model(torch.tensor([prompt])).logits[0].log_softmax(-1).numpy()
        exchange.answer = {"choices": [{"text": "", "prompt_logprobs": _layout(prompt, logprobs, width)}]}
        if fault is not None:
            fault(exchange)

    def enter(self) -> None:
        """Count a request in."""
        with self._lock:
            self._under_way += 1
            self.most_at_once = max(self.most_at_once, self._under_way)

    def leave(self) -> None:
        """Count a request out."""
        with self._lock:
            self._under_way -= 1


def _layout(prompt: list[int], logprobs: np.ndarray, width: int) -> list[dict[str, Any] | None]:
    rows: list[dict[str, Any] | None] = [None]
    for position, token in enumerate(prompt[1:]):
        order = np.argsort(-logprobs[position], kind="stable")
        kept = {token, *order[:width].tolist()}  # the prompt's own token comes first, as vLLM gives it
        rank = {int(other): place + 1 for place, other in enumerate(order)}
        rows.append(
            {
                str(other): {"logprob": float(logprobs[position, other]), "rank": rank[other], "decoded_token": "x"}
                for other in [token, *sorted(kept - {token}, key=lambda other: rank[other])]
            }
        )
    return rows


@contextmanager
def serving(server: CompletionsServer) -> Iterator[str]:
    """Serve on a free port of this machine; gives the address."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            self._respond({})

        def do_POST(self) -> None:
            self._respond(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

        def log_message(self, *_: Any) -> None:
            pass

        def _respond(self, request: dict[str, Any]) -> None:
            exchange = Exchange(self.path, request, dict(self.headers))
            server.enter()
            try:
                server.answer(exchange)
            finally:
                server.leave()
            body = json.dumps(exchange.answer).encode() if exchange.body is None else exchange.body
            self.send_response(exchange.status)
            for name, value in exchange.answer_headers.items():
                self.send_header(name, value)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(exchange.promised_bytes or len(body)))
            self.end_headers()
            self.wfile.write(body)
            if exchange.promised_bytes:
                self.close_connection = True

    httpd = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    httpd.daemon_threads = True
    thread = threading.Thread(target=httpd.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{httpd.server_address[1]}"
    finally:
        httpd.shutdown()
        httpd.server_close()
        thread.join()
