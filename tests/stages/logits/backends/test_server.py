"""The server backend against the transformers backend on the same model, and against a server's faults."""

import json
import math
import threading

import numpy as np
import pytest

from stages.logits.backends import server as backend_module
from stages.logits.backends.base import NotFiniteError
from stages.logits.backends.server import ServerBackend, ServerError
from stages.logits.backends.transformers import TransformersBackend
from stages.logits.config import LogitsConfig
from stages.models.config import ModelConfig
from stages.models.tokenizer import SegmentTokenizer
from stages.models.windows import context_windows
from tests.stages.logits.backends.completions_server import CompletionsServer, serving
from tests.stages.logits.test_stage import make_stage, shard_table
from tests.tiny_models import save_model
from tests.tiny_tokenizers import TEXTS

MAX_LENGTH = 64


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("served"), architecture="llama", tokenizer_family="spm-bpe")


@pytest.fixture
def server(folder, monkeypatch):
    monkeypatch.setattr(backend_module, "FIRST_PAUSE_SECONDS", 0.001)
    found = CompletionsServer(folder)
    with serving(found) as url:
        monkeypatch.setenv("PTAFUSE_SERVER_URL", url)
        yield found


def settings(**changes):
    base = {"backend": "server", "max_length": MAX_LENGTH, "dtype": "float32", "device": "cpu", "server_attempts": 3}
    return LogitsConfig(**{**base, **changes})


def make_backend(folder, **changes):
    model = ModelConfig(name="tiny-1.b", path=folder)
    return ServerBackend(settings(**changes), model, num_valid=SegmentTokenizer.load(model).vocabulary.size)


def sequences(folder):
    tokenizer = SegmentTokenizer.load(ModelConfig(name="tiny", path=folder))
    ids = [tokenizer.encode(text, is_last=True).ids for text in [*TEXTS, "a", "".join(TEXTS[:3])]]
    return [*ids, *(ids[-1][:length] for length in (MAX_LENGTH, MAX_LENGTH + 1, 1, 2))]


def predict(backend, ids):
    return backend.predict(
        ids, [context_windows(len(part), max_length=backend.max_length, num_prefix=1) for part in ids]
    )


def assert_equal(found, expected):
    assert np.array_equal(found.topk_ids, expected.topk_ids)
    np.testing.assert_allclose(found.topk_logprobs, expected.topk_logprobs, atol=2e-5, rtol=0)
    np.testing.assert_allclose(found.gold_logprob, expected.gold_logprob, atol=2e-5, rtol=0)


@pytest.fixture(scope="module")
def expected(folder):
    model = ModelConfig(name="tiny", path=folder)
    config = settings(backend="transformers")
    num_valid = SegmentTokenizer.load(model).vocabulary.size
    return predict(TransformersBackend(config, model, num_valid=num_valid), sequences(folder))


def test_it_gives_what_transformers_gives(server, folder, expected):
    backend = make_backend(folder)
    ids = sequences(folder)
    assert any(len(context_windows(len(part), max_length=MAX_LENGTH)) > 1 for part in ids)
    assert_equal(predict(backend, ids), expected)
    assert backend.versions == {"backend": "server", "server": "vllm 0.0.fake", "served_model": "tiny"}
    assert all(exchange.request["model"] == "tiny" for exchange in server.exchanges)


def test_the_context_of_the_server_bounds_the_windows(server, folder):
    server.max_model_len = 40
    backend = make_backend(folder)
    assert backend.max_length == 38
    predict(backend, sequences(folder))
    assert max(len(exchange.request["prompt"]) for exchange in server.exchanges) == 39


def test_a_context_that_leaves_no_window_is_refused(server, folder):
    server.max_model_len = 9
    with pytest.raises(ServerError, match=r"takes 9 tokens per request, which leaves windows of 7.*--max-model-len"):
        make_backend(folder)


def test_nothing_is_drawn_from_a_tail_that_the_server_does_not_give(server, folder):
    backend = make_backend(folder)
    before = len(server.exchanges)
    with pytest.raises(
        ValueError, match=r"tiny-1\.b: 4 draws .*a server returns only the largest entries: set logits\.backend"
    ):
        backend.predict([np.arange(3)], [context_windows(3, max_length=8)], np.zeros((3, 4)))
    assert len(server.exchanges) == before


def test_requests_go_side_by_side_but_not_more_than_allowed(server, folder, expected):
    backend = make_backend(folder, server_concurrency=3)
    three = threading.Event()

    def wait_for_two_more(_):
        if server.most_at_once >= 3:
            three.set()
        assert three.wait(timeout=60)

    server.always = wait_for_two_more
    assert_equal(predict(backend, sequences(folder)), expected)
    assert server.most_at_once == 3


def fail(status, **headers):
    def fault(exchange):
        exchange.status, exchange.answer = status, {"error": {"message": "busy"}}
        exchange.answer_headers.update(headers)

    return fault


def break_off(exchange):
    body = json.dumps(exchange.answer).encode()
    exchange.body, exchange.promised_bytes = body[: len(body) // 2], len(body)


def no_json(exchange):
    exchange.body = b"<html>gateway</html>"


@pytest.mark.parametrize(
    "fault", [fail(503), fail(429, **{"Retry-After": "0.01"}), fail(500), break_off, no_json], ids=range(5)
)
def test_transient_failures_are_retried(server, folder, expected, fault):
    backend = make_backend(folder, server_concurrency=2)
    server.faults = [fault, fault]
    assert_equal(predict(backend, sequences(folder)), expected)


def test_a_server_that_stays_away_is_given_up(server, folder):
    backend = make_backend(folder)
    server.always = fail(503)
    before = len(server.exchanges)
    with pytest.raises(
        ServerError, match=r"tiny-1\.b: http://.*/v1/completions failed 3 times.*503.*busy.*PTAFUSE_SERVER_URL"
    ):
        predict(backend, sequences(folder)[:1])
    assert len(server.exchanges) - before == 3


def test_a_refused_connection_says_where_it_went(folder, monkeypatch):
    monkeypatch.setattr(backend_module, "FIRST_PAUSE_SECONDS", 0.001)
    monkeypatch.setenv("PTAFUSE_SERVER_URL", "http://127.0.0.1:9")
    with pytest.raises(ServerError, match=r"http://127\.0\.0\.1:9/v1/models failed 3 times.*refused"):
        make_backend(folder)


def test_without_an_address_it_says_how_to_give_one(folder, monkeypatch):
    monkeypatch.delenv("PTAFUSE_SERVER_URL", raising=False)
    with pytest.raises(
        ServerError, match=r"set PTAFUSE_SERVER_URL, or PTAFUSE_SERVER_URL_TINY_1_B only for this model"
    ):
        make_backend(folder)
    monkeypatch.setenv("PTAFUSE_SERVER_URL", "127.0.0.1:8000")
    with pytest.raises(ServerError, match=r"PTAFUSE_SERVER_URL is '127\.0\.0\.1:8000': expected an address"):
        make_backend(folder)


def test_a_model_s_own_address_and_key_come_first(server, folder, monkeypatch):
    server.key = "secret"
    url = backend_module.os.environ["PTAFUSE_SERVER_URL"]
    monkeypatch.setenv("PTAFUSE_SERVER_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("PTAFUSE_SERVER_URL_TINY_1_B", f"{url}/v1/")
    with pytest.raises(ServerError, match=r"401 Unauthorized: Unauthorized \(set PTAFUSE_SERVER_KEY to a key"):
        make_backend(folder)
    monkeypatch.setenv("PTAFUSE_SERVER_KEY_TINY_1_B", "wrong")
    with pytest.raises(ServerError, match=r"set PTAFUSE_SERVER_KEY_TINY_1_B to a key") as caught:
        make_backend(folder)
    assert "wrong" not in str(caught.value)
    monkeypatch.setenv("PTAFUSE_SERVER_KEY_TINY_1_B", "secret")
    assert make_backend(folder).max_length == MAX_LENGTH


def test_several_models_of_a_server_want_a_name(server, folder):
    server.names = ["a", "b"]
    with pytest.raises(ServerError, match="serves a, b: choose one with `served_model`"):
        make_backend(folder)
    with pytest.raises(ServerError, match="serves a, b, and not served_model = 'c'"):
        make_backend(folder, served_model="c")
    make_backend(folder, served_model="b")
    assert server.exchanges[-1].request["model"] == "b"


def test_too_few_logprobs_are_found_out_at_once(server, folder):
    server.max_logprobs = 5
    with pytest.raises(ServerError, match=r"400 .*greater than max allowed: 5 \(.*--max-logprobs 10"):
        make_backend(folder, top_k=10)


def test_a_server_without_prompt_logprobs_is_refused(server, folder):
    server.always = lambda exchange: exchange.answer["choices"][0].pop("prompt_logprobs")
    with pytest.raises(ServerError, match=r"gives no prompt_logprobs: expected a server that does"):
        make_backend(folder)


def entries(exchange):
    return exchange.answer["choices"][0]["prompt_logprobs"]


def drop_the_sent_token(exchange):
    entries(exchange)[1].pop(str(exchange.request["prompt"][1]))


def cut_short(exchange):
    entries(exchange).pop()


def keep_one(exchange):
    token = str(exchange.request["prompt"][1])
    entries(exchange)[1] = {token: entries(exchange)[1][token]}


def give_an_unknown_token(exchange):
    entries(exchange)[1]["99999"] = {"logprob": -1e-9}


def give_a_string(exchange):
    entries(exchange)[1] = "-1.0"


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (drop_the_sent_token, r"no logprob of token \d+, which was sent there"),
        (cut_short, r"gave 1 prompt logprobs for 2 tokens"),
        (keep_one, r"gave 1 entries at a position, expected 10"),
        (give_an_unknown_token, r"token 99999 among the 10 most likely ones, which the tokenizer of \d+ tokens"),
        (give_a_string, r"gave a position's entries -1\.0: expected the answer of a vLLM server"),
    ],
)
def test_an_answer_of_another_layout_or_model_is_refused(server, folder, fault, message):
    server.always = fault
    with pytest.raises(ServerError, match=message):
        make_backend(folder)


@pytest.mark.parametrize("value", [None, math.nan])
def test_a_number_that_is_not_finite_is_named_with_its_place(server, folder, value):
    backend = make_backend(folder)

    def spoil(exchange):
        entries(exchange)[5][str(exchange.request["prompt"][5])]["logprob"] = value

    server.always = spoil
    with pytest.raises(NotFiniteError) as caught:
        predict(backend, sequences(folder)[:1])
    assert (caught.value.sequence, caught.value.position) == (0, 4)


def test_the_stage_writes_the_same_rows(server, folder):
    expected = make_stage(folder, max_length=MAX_LENGTH, backend="transformers")
    found = make_stage(folder, max_length=MAX_LENGTH, backend="server")
    tables = [stage.run({"shard": shard_table(TEXTS)}) for stage in (expected, found)]
    for name in ("doc_id", "token_ids", "byte_end", "topk_ids"):
        assert tables[1].table[name].equals(tables[0].table[name])
    assert tables[1].versions["backend"] == "server"
