"""The vLLM backend against the transformers backend. Needs vLLM: `make test-vllm` runs it on vLLM's CPU build."""

import json
import math
import os
import shutil

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file, save_file

from stages.contract.columns import sparse_row
from stages.logits.backends.choose import choose_backend
from stages.logits.backends.transformers import TransformersBackend
from stages.logits.backends.vllm import VllmBackend, is_installed, knows_architecture, vllm_version
from stages.logits.config import LogitsConfig
from stages.models.config import ModelConfig
from stages.models.tokenizer import SegmentTokenizer
from stages.models.windows import context_windows
from tests.stages.logits.test_stage import make_stage, shard_table
from tests.tiny_models import save_model
from tests.tiny_run import CONFIG, documents, ptafuse, ptafuse_process
from tests.tiny_tokenizers import TEXTS

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(not is_installed(), reason="vLLM is not installed; `make test-vllm` has an environment with it"),
]

MAX_LENGTH = 64
VERSIONS = {"backend": "vllm", "vllm": "0.32.0", "logprobs_mode": "raw_logprobs"}
ENVIRONMENT = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_LOGGING_LEVEL": "ERROR"}
IN_PIPELINE = ("--set", "logits.backend=vllm", "--set", "logits.gpu_memory_utilization=0.1")

# vLLM's CPU kernels want heads of 32 or more.
HEADS = {"num_attention_heads": 2, "num_key_value_heads": 1}
SHAPES = {
    "llama": HEADS,
    "qwen2": HEADS,
    "cohere": HEADS,
    "gemma3": {**HEADS, "head_dim": 32, "query_pre_attn_scalar": 32},
    "opt": {"num_attention_heads": 2},
    "gpt2": {"n_head": 2},
}


@pytest.fixture(scope="module", autouse=True)
def _environment():
    with pytest.MonkeyPatch.context() as patch:
        for name, value in ENVIRONMENT.items():
            patch.setenv(name, os.environ.get(name, value))
        yield


def save(folder, architecture="llama", family="spm-bpe", **arguments):
    return save_model(
        folder, architecture=architecture, tokenizer_family=family, settings=SHAPES[architecture], **arguments
    )


def settings(**changes):
    base = {"max_length": MAX_LENGTH, "dtype": "float32", "device": "cpu", "batch_tokens": 256}
    return LogitsConfig(**{**base, "gpu_memory_utilization": 0.1, **changes})


def both(folder, **changes):
    """What transformers and vLLM predict for the same segments, and these.

    Transformers goes first: where vLLM has no code of its own for an architecture it takes transformers' class, and
    wraps it for the whole process.
    """
    model = ModelConfig(name="tiny", path=folder)
    tokenizer = SegmentTokenizer.load(model)
    texts = [*TEXTS, "a", "".join(TEXTS[:3])]
    ids = [tokenizer.encode(text, is_last=True).ids for text in texts]
    # At the limit, one more, one less; one token alone; two.
    ids += [ids[-1][:length] for length in (MAX_LENGTH, MAX_LENGTH + 1, MAX_LENGTH - 1, 1, 2)]
    config, found = settings(**changes), []
    for kind in (TransformersBackend, VllmBackend):
        backend = kind(config, model, num_valid=tokenizer.vocabulary.size)
        assert backend.max_length == MAX_LENGTH
        num_prefix = tokenizer.num_prefix
        cuts = [context_windows(len(part), max_length=MAX_LENGTH, num_prefix=num_prefix) for part in ids]
        assert any(len(cut) > 1 for cut in cuts)
        found.append(backend.predict(ids, cuts))
        del backend
    return *found, tokenizer


def assert_agree(expected, found, *, tolerance):
    assert np.array_equal(found.starts, expected.starts)
    np.testing.assert_allclose(found.topk_logprobs, expected.topk_logprobs, atol=tolerance, rtol=0)
    np.testing.assert_allclose(found.gold_logprob, expected.gold_logprob, atol=tolerance, rtol=0)
    assert_same_ids(expected, found, gap=2 * tolerance)


def assert_same_ids(expected, found, *, gap):
    """The same token wherever its logprob is more than ``gap`` away from both neighbours'."""
    gaps = -np.diff(expected.topk_logprobs, axis=1)
    far = np.full(expected.topk_ids.shape, True)
    far[:, 1:] &= gaps > gap
    far[:, :-1] &= gaps > gap
    far[:, -1] = False  # its lower neighbour is not known
    width = far.shape[1]
    assert width == 1 or far.any()
    assert np.array_equal(found.topk_ids[far], expected.topk_ids[far])


@pytest.mark.parametrize(
    ("architecture", "family"),
    [
        ("llama", "spm-bpe"),  # BOS in every window
        ("gemma3", "spm-bpe"),
        ("qwen2", "byte-bpe"),
        ("cohere", "byte-bpe"),  # logits are scaled
        ("opt", "byte-bpe"),  # learned positions: none behind the limit
        ("gpt2", "byte-bpe"),
    ],
)
def test_both_backends_agree_in_float32(tmp_path, architecture, family):
    # The padded rows have the largest logits of all: the logprobs would be far off if they counted.
    folder = save(tmp_path, architecture, family, vocab_padding=11, max_positions=MAX_LENGTH)
    expected, found, tokenizer = both(folder)
    assert_agree(expected, found, tolerance=1e-4)
    assert found.topk_ids.max() < tokenizer.vocabulary.size
    assert found.forward_seconds > 0
    assert found.oom_retries == 0


def test_soft_capped_logits_are_capped(tmp_path):
    folder = save(tmp_path, "gemma3", "spm-bpe", final_logit_softcapping=1.5)
    expected, found, _ = both(folder)
    assert_agree(expected, found, tolerance=1e-4)


@pytest.mark.parametrize("top_k", [1, 20])
def test_any_top_k(tmp_path, top_k):
    expected, found, _ = both(save(tmp_path), top_k=top_k)
    assert found.topk_ids.shape[1] == top_k
    assert_agree(expected, found, tolerance=1e-4)


@pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="needs two cores")
def test_two_processes_share_one_model(tmp_path, monkeypatch):
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1")
    folder = save_model(
        tmp_path,
        architecture="llama",
        tokenizer_family="byte-bpe",
        vocab_padding=11,
        settings={"num_attention_heads": 2, "num_key_value_heads": 2},
    )
    expected, found, _ = both(folder, tensor_parallel_size=2)
    assert_agree(expected, found, tolerance=1e-4)


def test_bfloat16_is_as_near_to_float32_as_transformers_is(tmp_path):
    """bfloat16 rounds each logit to 8 bits: single positions differ by more than 1e-2 in either backend, means do not."""
    folder = save(tmp_path)
    exact, _, _ = both(folder)
    expected, found, _ = both(folder, dtype="bfloat16")
    has_gold = ~np.isnan(exact.gold_logprob)
    errors = [np.abs(part.gold_logprob - exact.gold_logprob)[has_gold] for part in (expected, found)]
    assert errors[1].mean() < 1.25 * errors[0].mean()
    means = [part.gold_logprob[has_gold].mean() for part in (exact, expected, found)]
    assert np.ptp(means) < 1e-2
    assert_same_ids(expected, found, gap=4 * max(error.max() for error in errors))


def test_out_of_memory_rebuilds_a_smaller_engine(tmp_path):
    folder = save(tmp_path)
    shard = {"shard": shard_table(TEXTS)}
    arguments = {"backend": "vllm", "max_length": MAX_LENGTH, "gpu_memory_utilization": 0.1, "batch_tokens": 4096}
    stage = make_stage(folder, **arguments)
    expected = stage.run(shard)
    backend, engine = stage._backend, stage._backend._engine
    generate = engine.generate

    def small_machine(*inputs, **options):
        if backend._batch_tokens > 32:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return generate(*inputs, **options)

    engine.generate = small_machine
    found = stage.run(shard)
    assert found.health["oom_retries"] == 1
    assert backend._engine is not engine
    assert backend._batch_tokens == MAX_LENGTH // 2
    assert found.table["topk_ids"].equals(expected.table["topk_ids"])
    assert found.health["bits_per_byte"].value == pytest.approx(expected.health["bits_per_byte"].value, abs=1e-5)
    assert stage.run(shard).health["oom_retries"] == 0  # what was learnt stays


def test_numbers_that_are_not_finite_are_refused_with_their_place(tmp_path):
    folder = save(tmp_path, "qwen2", "byte-bpe")
    tokenizer = SegmentTokenizer.load(ModelConfig(name="m", path=folder))
    ids = tokenizer.encode(TEXTS[3], is_last=True).ids
    earlier = {int(token) for text in TEXTS[:3] for token in tokenizer.encode(text, is_last=True).ids}
    new_token = next(int(token) for token in ids if int(token) not in earlier)
    weights = load_file(folder / "model.safetensors")
    weights["model.embed_tokens.weight"][new_token] = math.nan
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    stage = make_stage(folder, backend="vllm", gpu_memory_utilization=0.1)
    # The position depends on the kernel: some multiply the values of masked positions by 0, which leaves NaN before the token.
    with pytest.raises(ValueError, match=rf"not finite at doc_id 103, segment 0, position \d+ of {len(ids)}"):
        stage.run({"shard": shard_table(TEXTS[:4])})


def test_a_model_that_vllm_does_not_know_goes_to_transformers(tmp_path, monkeypatch):
    llama = ModelConfig(name="llama", path=save(tmp_path / "llama"))
    mpt = ModelConfig(name="mpt", path=save_model(tmp_path / "mpt", architecture="mpt", tokenizer_family="byte-bpe"))
    assert knows_architecture(llama)
    assert not knows_architecture(mpt)
    auto = LogitsConfig()
    assert choose_backend(auto, llama) == "transformers"  # there is no GPU
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert choose_backend(auto, llama) == "vllm"
    assert choose_backend(auto, mpt) == "transformers"
    assert choose_backend(LogitsConfig(device="cpu"), llama) == "transformers"


def test_a_build_for_another_device_is_refused(tmp_path, monkeypatch):
    folder = save(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(ValueError, match="installed vLLM is built for 'cpu': install the build for 'cuda'"):
        VllmBackend(settings(device="auto"), ModelConfig(name="tiny", path=folder), num_valid=300)


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    save(folder / "llama")
    save(folder / "neox", "gpt2", "byte-bpe", seed=2)  # under the name that the configuration has
    lines = [json.dumps({"text": text}, ensure_ascii=False) for text in documents()]
    (folder / "corpus.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    path = folder / "tiny.toml"
    path.write_text(CONFIG.format(folder=folder))
    return path


def logits_of(run, model):
    """(manifest, table) of each shard of one model's only folder."""
    paths = sorted(run.glob(f"logits/{model}/*/manifests/*.json"))
    assert len({path.parent for path in paths}) == 1
    manifests = [json.loads(path.read_text()) for path in paths]
    return [(manifest, pq.read_table(run / manifest["data"]["key"])) for manifest in manifests]


def assert_runs_agree(expected_run, run):
    for model in ("llama", "neox"):
        pairs = list(zip(logits_of(expected_run, model), logits_of(run, model), strict=True))
        assert len(pairs) == 6
        for (before, expected), (after, found) in pairs:
            assert before["versions"]["backend"] == "transformers"
            assert after["versions"] | VERSIONS == after["versions"]
            assert after["health"]["forward_seconds"] > 0
            assert found.schema.equals(expected.schema, check_metadata=True)
            for name in ("doc_id", "segment", "token_ids", "byte_end"):
                assert found[name].equals(expected[name])
            for row in range(len(expected)):
                one, other = sparse_row(expected, row), sparse_row(found, row)
                np.testing.assert_allclose(other.logprobs, one.logprobs, atol=1e-2)  # rounded to float16
            bits = [manifest["health"]["bits_per_byte"]["total"] for manifest in (before, after)]
            assert bits[1] == pytest.approx(bits[0], abs=0.05)
        # Shards overlap, and each has the part of the stage's time that passed since the one before it: compare the sums.
        forward, stage = (
            sum(after["health"][name] for _, (after, _) in pairs) for name in ("forward_seconds", "stage_seconds")
        )
        assert forward <= stage + 0.01  # both are rounded


@pytest.fixture(scope="module")
def transformers_run(config, tmp_path_factory):
    run = tmp_path_factory.mktemp("transformers") / "run"
    ptafuse("shard", str(config), "--run", str(run), "--local")
    ptafuse("logits", str(config), "--run", str(run), "--local")  # auto on a CPU
    return run


@pytest.fixture(scope="module")
def vllm_run(config, transformers_run, tmp_path_factory):
    run = tmp_path_factory.mktemp("vllm") / "run"
    ptafuse("shard", str(config), "--run", str(run), "--local")
    ptafuse("logits", str(config), "--run", str(run), "--local", *IN_PIPELINE)
    return run


def test_the_whole_stage_in_one_process(transformers_run, vllm_run):
    assert_runs_agree(transformers_run, vllm_run)
    assert not list(vllm_run.glob("logits/*/*/choices.json"))  # nothing was left open
    for path in transformers_run.glob("logits/*/*/choices.json"):
        assert json.loads(path.read_text()) == {"backend": "transformers"}


def test_another_version_of_vllm_is_warned_of(config, vllm_run, tmp_path, caplog):
    run = shutil.copytree(vllm_run, tmp_path / "run")
    first, *_, last = sorted(run.glob("logits/llama/*/manifests/*.json"))
    first.write_text(first.read_text().replace(f'"vllm": "{vllm_version()}"', '"vllm": "0.31.0"'))
    last.unlink()
    refused = ptafuse("logits", str(config), "--run", str(run), "--local", "--strict", *IN_PIPELINE, check=False)
    assert refused.returncode
    assert "vllm 0.31.0 -> 0.32.0" in refused.stderr


@pytest.mark.ray
def test_the_whole_stage_on_ray(config, transformers_run, tmp_path):
    run = tmp_path / "run"
    ptafuse("shard", str(config), "--run", str(run), "--local")
    ptafuse_process("logits", str(config), "--run", str(run), *IN_PIPELINE)
    assert_runs_agree(transformers_run, run)
