"""The server backend against vLLM's own server and the vLLM backend. Needs vLLM: `make test-vllm` runs it on its CPU build."""

import os
import socket
import subprocess
import sys
import time

import numpy as np
import pytest
import requests

from stages.logits.backends.server import ServerBackend, ServerError
from stages.logits.backends.vllm import VllmBackend, is_installed
from stages.models.config import ModelConfig
from stages.models.tokenizer import SegmentTokenizer
from stages.models.windows import context_windows
from tests.stages.logits.backends.test_vllm import ENVIRONMENT, MAX_LENGTH, assert_agree, save, settings
from tests.tiny_tokenizers import TEXTS

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(not is_installed(), reason="vLLM is not installed; `make test-vllm` has an environment with it"),
]

TOP_K = 12
KEY = "a key"


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save(tmp_path_factory.mktemp("served"), max_positions=4 * MAX_LENGTH)


@pytest.fixture(scope="module")
def address(folder, tmp_path_factory):
    port = free_port()
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder), "--port", str(port)]
    command += ["--host", "127.0.0.1", "--dtype", "float32", "--max-logprobs", str(TOP_K), "--api-key", KEY]
    command += ["--served-model-name", "tiny", "--enforce-eager", "--max-num-seqs", "8", "--load-format", "safetensors"]
    command += ["--no-enable-prefix-caching"]
    log = tmp_path_factory.mktemp("log") / "server.log"
    with log.open("w") as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, env={**os.environ, **ENVIRONMENT, "HF_HUB_OFFLINE": "1"}
        )
    url = f"http://127.0.0.1:{port}"
    try:
        wait_for(url, process, log)
        yield url
    finally:
        process.terminate()
        process.wait(timeout=60)


def wait_for(url, process, log):
    deadline = time.monotonic() + 600
    while time.monotonic() < deadline:
        assert process.poll() is None, log.read_text()[-3000:]
        try:
            if requests.get(f"{url}/health", timeout=5).ok:
                return
        except requests.RequestException:
            pass
        time.sleep(1)
    raise AssertionError(f"no server after ten minutes: {log.read_text()[-3000:]}")


@pytest.fixture
def model(folder, address, monkeypatch):
    monkeypatch.setenv("PTAFUSE_SERVER_URL", address)
    monkeypatch.setenv("PTAFUSE_SERVER_KEY", KEY)
    return ModelConfig(name="tiny", path=folder)


def test_the_server_gives_what_the_vllm_backend_gives(model):
    tokenizer = SegmentTokenizer.load(model)
    num_valid, num_prefix = tokenizer.vocabulary.size, tokenizer.num_prefix
    texts = [*TEXTS, "a", "".join(TEXTS[:3])]
    ids = [tokenizer.encode(text, is_last=True).ids for text in texts]
    ids += [ids[-1][:length] for length in (MAX_LENGTH, MAX_LENGTH + 1, 1, 2)]
    cuts = [context_windows(len(part), max_length=MAX_LENGTH, num_prefix=num_prefix) for part in ids]
    assert any(len(cut) > 1 for cut in cuts)
    served = ServerBackend(settings(backend="server", top_k=TOP_K), model, num_valid=num_valid)
    assert served.max_length == MAX_LENGTH
    assert served.versions["server"].startswith("vllm ")
    found = served.predict(ids, cuts)
    expected = VllmBackend(settings(top_k=TOP_K), model, num_valid=num_valid).predict(ids, cuts)
    assert_agree(expected, found, tolerance=1e-4)
    assert np.array_equal(np.isnan(found.gold_logprob), np.isnan(expected.gold_logprob))


def test_more_logprobs_than_the_server_was_started_for_are_refused(model):
    with pytest.raises(ServerError, match=rf"--max-logprobs {TOP_K + 1}"):
        ServerBackend(settings(backend="server", top_k=TOP_K + 1), model, num_valid=1000)


def test_a_wrong_key_is_refused(model, monkeypatch):
    monkeypatch.setenv("PTAFUSE_SERVER_KEY", "another")
    with pytest.raises(ServerError, match="set PTAFUSE_SERVER_KEY to a key"):
        ServerBackend(settings(backend="server"), model, num_valid=1000)
