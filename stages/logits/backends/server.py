"""Server backend: prompt logprobs of a model that a server already runs, over HTTP.

Any server works whose OpenAI-compatible ``/v1/completions`` takes token ids and returns ``prompt_logprobs``, as vLLM's does.
A window is one request, of its tokens and the one after it: entry i + 1 of the answer holds the k largest logprobs after
token i, and that of token i + 1. So all positions are answered in the same way, including the last one, and the answer
contains the ids that were sent.

The server's address and key are not part of the configuration, which gets recorded: they come from the
environment, ``PTAFUSE_SERVER_URL`` and ``PTAFUSE_SERVER_KEY``, or for a single model with its name appended
(``PTAFUSE_SERVER_URL_QWEN3_8B`` for ``qwen3-8b``).
"""

import logging
import math
import os
import random
import re
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from http import HTTPStatus
from typing import Any, Final

import numpy as np
import requests

from stages.logits.backends.base import Predictions, descending, refuse_draws
from stages.logits.config import LogitsConfig
from stages.models.config import ModelConfig, load_config, num_positions
from stages.models.windows import ContextWindow

log = logging.getLogger(__name__)

URL_VARIABLE: Final = "PTAFUSE_SERVER_URL"
KEY_VARIABLE: Final = "PTAFUSE_SERVER_KEY"
FIRST_PAUSE_SECONDS: Final = 1.0
"""Pause before the second attempt at a request, doubled for each further one; the actual pause is 50 % to 100 % of it."""
_LONGEST_PAUSE_SECONDS: Final = 60.0
_PASSING: Final = frozenset(
    {
        HTTPStatus.REQUEST_TIMEOUT,
        HTTPStatus.TOO_MANY_REQUESTS,
        HTTPStatus.INTERNAL_SERVER_ERROR,
        HTTPStatus.BAD_GATEWAY,
        HTTPStatus.SERVICE_UNAVAILABLE,
        HTTPStatus.GATEWAY_TIMEOUT,
    }
)
"""Status codes of transient failures of a server."""
_NUM_EXTRA: Final = 2
"""Tokens of the server's context that a window leaves free: the one after it, and the one that must be generated."""
_SHORTEST_WINDOW: Final = 8
"""Smallest ``logits.max_length``, in tokens."""


class ServerError(ValueError):
    """Error of a server that cannot give this model's logprobs.

    The message says which server, what it answered, and what to do.
    """


class ServerBackend:
    """Causal language model behind an HTTP endpoint; see ``base.Backend``.

    The server decides the precision and normalises over every row of the model's head. A token that the tokenizer does not
    have is refused where it is among the k largest; a lower one has had its share.
    """

    def __init__(self, config: LogitsConfig, model: ModelConfig, *, num_valid: int) -> None:
        """Ask the server what it serves, and for the logprobs of one short prompt.

        Args:
            config: the stage's settings.
            model: which model; its configuration is read, its weights are not.
            num_valid: the tokenizer's length; ids at or above it are not tokens.

        Raises:
            ServerError: there is no address, nothing answers, the key is refused, the model is not served there, its context
                is too short, or the server gives no prompt logprobs of this width.
        """
        self._config = config
        self._name = model.name
        self._num_valid = num_valid
        self._connection = _Connection(config, model.name)
        settings = load_config(model)
        self.num_embeddings = int(settings.get_text_config().vocab_size)
        self._width = min(config.top_k, num_valid, self.num_embeddings)
        served, limit = self._connection.served_model(config.served_model)
        self._served = served
        self.max_length = num_positions(settings, config.max_length)
        if limit is not None:
            self.max_length = min(self.max_length, limit - _NUM_EXTRA)
        if self.max_length < _SHORTEST_WINDOW:
            raise ServerError(
                f"model {model.name}: {self._connection.url} takes {limit} tokens per request, which leaves windows of "
                f"{self.max_length}: expected {_SHORTEST_WINDOW} or more. Start it with a larger --max-model-len"
            )
        self._predict_window(np.zeros(1, np.int32), next_id=0)
        self.versions: Mapping[str, str] = {"backend": "server", **self._connection.version(), "served_model": served}

    def predict(
        self,
        sequences: Sequence[np.ndarray],
        cuts: Sequence[Sequence[ContextWindow]],
        uniforms: np.ndarray | None = None,
    ) -> Predictions:
        """Send all windows, ``server_concurrency`` at a time; see ``base.Backend.predict``.

        Raises:
            ServerError: a window failed for good; those under way are waited for, no others are sent.
            ValueError: draws from the tail are asked for.
        """
        refuse_draws(uniforms, model=self._name, who="a server")
        predictions = Predictions.empty([len(sequence) for sequence in sequences], width=self._width)
        inputs = [(index, window) for index, cut in enumerate(cuts) for window in cut]
        started = time.perf_counter()

        def answer(item: tuple[int, ContextWindow]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
            index, window = item
            behind = sequences[index][window.end : window.end + 1]
            tokens = window.tokens(sequences[index])
            # After a text's last token any token may be sent: what follows is unknown.
            return self._predict_window(tokens, next_id=int(behind[0]) if len(behind) else int(tokens[-1]))

        pool = ThreadPoolExecutor(self._config.server_concurrency)
        try:
            for (index, window), (ids, logprobs, gold) in zip(inputs, pool.map(answer, inputs), strict=True):
                rows = predictions.starts[index] + np.arange(window.take_start, window.end)
                predictions.put(rows, ids[window.taken], logprobs[window.taken], gold[window.taken])
        finally:
            pool.shutdown(cancel_futures=True)
        predictions.forward_seconds = time.perf_counter() - started
        return predictions

    def _predict_window(self, tokens: np.ndarray, *, next_id: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return (N, k) ids and logprobs, and (N,) logprobs of the next tokens, of a window of N tokens."""
        prompt = [*tokens.tolist(), next_id]
        request = {
            "model": self._served,
            "prompt": prompt,
            "prompt_logprobs": self._width,
            "max_tokens": 1,
            "temperature": 0,
        }
        answer = self._connection.ask("/v1/completions", request, read=_prompt_logprobs)
        if len(answer) != len(prompt):
            raise self._wrong(f"{len(answer)} prompt logprobs for {len(prompt)} tokens")
        rows = [self._entries(entries, token) for entries, token in zip(answer[1:], prompt[1:], strict=True)]
        ids, logprobs = descending(
            np.stack([row[0] for row in rows]).astype(np.int32),
            np.stack([row[1] for row in rows]).astype(np.float32),
        )
        return ids, logprobs, np.array([row[2] for row in rows], np.float32)

    def _entries(self, entries: Any, next_token: int) -> tuple[np.ndarray, np.ndarray, float]:
        """Return a position's k largest ids and logprobs, in any order, and the logprob of the next token."""
        try:
            logprob_by_id = {int(token): _number(entry["logprob"]) for token, entry in entries.items()}
        except (AttributeError, KeyError, TypeError, ValueError):
            raise self._wrong(f"a position's entries {str(entries)[:120]}") from None
        if next_token not in logprob_by_id:
            raise self._wrong(f"no logprob of token {next_token}, which was sent there (is it another tokenizer's?)")
        ids = np.fromiter(logprob_by_id.keys(), np.int64, len(logprob_by_id))
        logprobs = np.fromiter(logprob_by_id.values(), np.float64, len(logprob_by_id))
        # The next token is listed in addition to the k largest, or is one of them. Values that are not finite come first.
        order = np.argsort(-np.nan_to_num(logprobs, nan=np.inf), kind="stable")[: self._width]
        if len(order) < self._width:
            raise self._wrong(f"{len(order)} entries at a position, expected {self._width}")
        if (largest := int(ids[order].max())) >= self._num_valid:
            raise self._wrong(
                f"token {largest} among the {self._width} most likely ones, which the tokenizer of {self._num_valid} tokens "
                "does not have"
            )
        return ids[order], logprobs[order], logprob_by_id[next_token]

    def _wrong(self, answer: str) -> ServerError:
        return ServerError(
            f"model {self._name}: {self._connection.url} gave {answer}: expected the answer of a vLLM server. Does it "
            "serve exactly this model? (if it serves several models, `served_model` under [logits] names the model)"
        )


class _Connection:
    """Requests to one server, tried again while what fails may pass."""

    def __init__(self, config: LogitsConfig, model: str) -> None:
        self._config = config
        self._model = model
        self._url_variable, self.url = _from_environment(URL_VARIABLE, model)
        if not self.url:
            raise ServerError(
                f"model {model}: logits.backend = 'server', but its address is not set: set {URL_VARIABLE}, or "
                f"{_own_variable(URL_VARIABLE, model)} only for this model, e.g. to http://127.0.0.1:8000"
            )
        self.url = self.url.rstrip("/").removesuffix("/v1")
        if not self.url.startswith(("http://", "https://")):
            raise ServerError(
                f"model {model}: {self._url_variable} is {self.url!r}: expected an address such as http://127.0.0.1:8000"
            )
        self._key_variable, key = _from_environment(KEY_VARIABLE, model)
        self._headers = {"Authorization": f"Bearer {key}"} if key else {}

    def ask(self, path: str, body: Mapping[str, Any] | None, *, read: Any) -> Any:
        """Return what ``read`` makes of the server's answer.

        Args:
            path: path of the endpoint.
            body: JSON to post; None: send a GET.
            read: function from the JSON of an answer to the result; raises ``ServerError`` with the message's end.

        Raises:
            ServerError: it failed for good, or as often as ``server_attempts`` says.
        """
        pause = FIRST_PAUSE_SECONDS
        for attempt in range(1, self._config.server_attempts + 1):
            try:
                response = requests.request(
                    "GET" if body is None else "POST",
                    self.url + path,
                    json=body,
                    headers=self._headers,
                    timeout=(min(30.0, self._config.server_timeout_seconds), self._config.server_timeout_seconds),
                )
                content = response.json() if response.ok else None
            except requests.RequestException as error:  # refused, timed out, broken off, or no JSON
                failure, wait = _in_short(error), None
            else:
                if response.ok:
                    return self._read(read, content)
                failure = f"{response.status_code} {response.reason}: {_message(response)}"
                if response.status_code not in _PASSING:
                    raise self._refused(response.status_code, path, failure)
                wait = _retry_after(response)
            if attempt < self._config.server_attempts:
                seconds = min(wait or pause * random.uniform(0.5, 1), _LONGEST_PAUSE_SECONDS)
                log.warning("model %s: %s, again in %.1f s: %s", self._model, self.url, seconds, failure)
                time.sleep(seconds)
                pause *= 2
        raise ServerError(
            f"model {self._model}: {self.url}{path} failed {self._config.server_attempts} times, at last with: {failure}. Is "
            f"the server up, and is {self._url_variable} its address?"
        )

    def served_model(self, wanted: str | None) -> tuple[str, int | None]:
        """Return the name under which the server has the model, and the most tokens of a request where it says so.

        Raises:
            ServerError: it serves another model, or several and none is named.
        """
        models = self.ask("/v1/models", None, read=lambda content: {model["id"]: model for model in content["data"]})
        names = ", ".join(models) or "none"
        if wanted is not None and wanted not in models:
            raise ServerError(
                f"model {self._model}: {self.url} serves {names}, and not served_model = {wanted!r} ([logits])"
            )
        if wanted is None and len(models) != 1:
            raise ServerError(
                f"model {self._model}: {self.url} serves {names}: choose one with `served_model` under [logits]"
            )
        name = wanted or next(iter(models))
        limit = models[name].get("max_model_len")
        return name, None if limit is None else int(limit)

    def version(self) -> dict[str, str]:
        """Return what vLLM's server says of its version; nothing for another one."""
        try:
            response = requests.get(f"{self.url}/version", headers=self._headers, timeout=30)
            return {"server": f"vllm {response.json()['version']}"}
        except (requests.RequestException, KeyError, TypeError):
            return {}

    def _read(self, read: Any, content: Any) -> Any:
        try:
            return read(content)
        except ServerError as error:
            raise ServerError(f"model {self._model}: {self.url} {error}") from None
        except (KeyError, IndexError, TypeError, AttributeError):
            raise ServerError(
                f"model {self._model}: {self.url} gave {str(content)[:120]}: expected the answer of an OpenAI-compatible server"
            ) from None

    def _refused(self, status: int, path: str, failure: str) -> ServerError:
        if status in (HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN):
            hint = f"set {self._key_variable} to a key that it takes"
        elif status == HTTPStatus.NOT_FOUND:
            hint = f"is {self._url_variable} the address of an OpenAI-compatible server, without /v1 and the rest of the path?"
        else:
            hint = (
                f"a vLLM server returns {self._config.top_k} logprobs a position if it is started with --max-logprobs "
                f"{self._config.top_k} or more"
            )
        return ServerError(f"model {self._model}: {self.url}{path} answered {failure} ({hint})")


def _own_variable(variable: str, model: str) -> str:
    return f"{variable}_{re.sub(r'[^A-Za-z0-9]', '_', model).upper()}"


def _from_environment(variable: str, model: str) -> tuple[str, str]:
    """Return the variable that holds a value for a model, its own one first, and the value; empty where none does."""
    model_variable = _own_variable(variable, model)
    if value := os.environ.get(model_variable, "").strip():
        return model_variable, value
    return variable, os.environ.get(variable, "").strip()


def _prompt_logprobs(content: Any) -> list[Any]:
    logprobs = content["choices"][0].get("prompt_logprobs")
    if not isinstance(logprobs, list):
        raise ServerError(
            "gives no prompt_logprobs: expected a server that does, such as vLLM (OpenAI's own does not). Compute this "
            "model with logits.backend = 'transformers' or 'vllm'"
        )
    return logprobs


def _number(value: Any) -> float:
    return math.nan if value is None else float(value)


def _message(response: requests.Response) -> str:
    """Return what an error's body says: the message of OpenAI's shape, or its beginning."""
    try:
        content = response.json()
        error = content.get("error", content)
        return str(error["message"] if isinstance(error, dict) else error)[:500]
    except (requests.RequestException, KeyError, AttributeError):
        return response.text[:200].strip() or "(nothing)"


def _retry_after(response: requests.Response) -> float | None:
    value = response.headers.get("Retry-After", "")
    return float(value) if re.fullmatch(r"\d+(\.\d+)?", value) else None


def _in_short(error: requests.RequestException) -> str:
    """Return an error without the object addresses and nested exceptions that urllib3 puts into it."""
    if isinstance(error, requests.JSONDecodeError):
        return "the answer is not JSON"
    if isinstance(error, requests.Timeout):
        return "no answer in time (server_timeout_seconds)"
    reason = getattr(error.args[0], "reason", error) if error.args else error
    return re.sub(r"<[^>]* object at 0x[0-9a-f]+>:? ?", "", f"{type(error).__name__}: {reason}")
