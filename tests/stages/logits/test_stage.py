"""The logits stage, against the model's own logits one segment at a time."""

import json
import math
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pyarrow as pa
import pytest
import torch
from safetensors.torch import load_file, save_file

from stages.contract.columns import PAD_ID, list_row, round_to_half, sparse_row
from stages.contract.draws import add_draws, draws_row, has_draws
from stages.contract.schemas import SHARD, logits_schema
from stages.logits.config import LogitsConfig
from stages.logits.stage import LogitsStage
from stages.measures.cross_entropy import cross_entropy
from stages.models.config import ModelConfig, load_model
from stages.models.tokenizer import SegmentTokenizer
from tests.tiny_models import ARCHITECTURES, save_model
from tests.tiny_tokenizers import TEXTS

TOP_K = 7


@pytest.fixture(autouse=True)
def _keep_threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def shard_table(texts, *, is_last=True, splits=None):
    rows = [
        {"doc_id": 100 + index, "segment": index % 3, "split": split, "byte_start": 0, "is_last": is_last, "text": text}
        for index, (text, split) in enumerate(zip(texts, splits or ["train"] * len(texts), strict=True))
    ]
    return pa.Table.from_pylist(rows, schema=SHARD)


def make_stage(folder, **settings):
    config = LogitsConfig(**{"top_k": TOP_K, "max_length": 256, "dtype": "float32", "device": "cpu", **settings})
    stage = LogitsStage(config, ModelConfig(name="tiny", path=folder))
    stage.setup()
    return stage


class Oracle:
    """``model(ids).logits``, whole, one input at a time."""

    def __init__(self, folder):
        model = ModelConfig(name="oracle", path=folder)
        self.tokenizer = SegmentTokenizer.load(model)
        self.model = load_model(model, dtype="float32", attention=("eager",), device="cpu")

    def logprobs(self, ids):
        with torch.inference_mode():
            logits = self.model(torch.from_numpy(np.asarray(ids, np.int64))[None]).logits[0].float()
        return logits[:, : self.tokenizer.vocabulary.size].log_softmax(-1).numpy()


def assert_row_agrees(table, row, ids, logprobs):
    assert np.array_equal(list_row(table, "token_ids", row), ids)
    gold = list_row(table, "gold_logprob", row)
    np.testing.assert_allclose(gold[:-1], logprobs[np.arange(len(ids) - 1), ids[1:]], atol=3e-5, rtol=1e-3)
    assert np.isnan(gold[-1])
    sparse = sparse_row(table, row)
    expected = -np.sort(-logprobs, axis=1)[:, :TOP_K]
    np.testing.assert_allclose(sparse.logprobs, expected, atol=1e-4, rtol=1e-3)  # float16's precision
    np.testing.assert_allclose(np.take_along_axis(logprobs, sparse.ids.astype(np.int64), axis=1), expected, atol=3e-5)
    assert (np.diff(sparse.logprobs, axis=1) <= 0).all()


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("llama"), architecture="llama", tokenizer_family="spm-bpe")


@pytest.mark.parametrize(
    ("architecture", "family"),
    [
        *((name, "byte-bpe") for name in ARCHITECTURES),
        ("llama", "spm-bpe"),
        ("phi", "unigram"),
        ("gemma3", "wordpiece"),
    ],
)
def test_every_architecture_agrees_with_its_own_logits(tmp_path, architecture, family):
    folder = save_model(tmp_path, architecture=architecture, tokenizer_family=family, vocab_padding=11)
    output = make_stage(folder, batch_tokens=400, chunk_positions=50).run({"shard": shard_table(TEXTS)})
    oracle = Oracle(folder)
    table = output.table
    assert table.schema.equals(logits_schema(oracle.tokenizer.vocabulary.size), check_metadata=True)
    assert table["doc_id"].to_pylist() == [100 + index for index in range(len(TEXTS))]
    assert not output.quarantine
    for row, text in enumerate(TEXTS):
        encoding = oracle.tokenizer.encode(text, is_last=True)
        assert np.array_equal(list_row(table, "byte_end", row), encoding.byte_end)
        assert_row_agrees(table, row, encoding.ids, oracle.logprobs(encoding.ids))


def test_soft_capped_logits_are_capped(tmp_path):
    folder = save_model(tmp_path, architecture="gemma3", tokenizer_family="spm-bpe", final_logit_softcapping=1.5)
    table = make_stage(folder).run({"shard": shard_table(TEXTS[:2])}).table
    oracle = Oracle(folder)
    ids = list_row(table, "token_ids", 0)
    assert_row_agrees(table, 0, ids, oracle.logprobs(ids))
    spread = np.ptp(oracle.logprobs(ids), axis=1)
    assert (spread <= 3).all()


def test_batches_do_not_change_the_rows(llama):
    texts = [*TEXTS, *[text[:20] for text in TEXTS], "a"]
    one = make_stage(llama, batch_tokens=1, chunk_positions=1).run({"shard": shard_table(texts)})
    many = make_stage(llama, batch_tokens=4096).run({"shard": shard_table(texts)})
    for row in range(len(texts)):
        assert np.array_equal(list_row(one.table, "token_ids", row), list_row(many.table, "token_ids", row))
        assert np.array_equal(sparse_row(one.table, row).ids, sparse_row(many.table, row).ids)
        for name in ("gold_logprob", "topk_logprobs"):
            left, right = (np.array(flat(output.table, name, row)) for output in (one, many))
            np.testing.assert_allclose(left, right, atol=1e-5, rtol=1.1e-3)


def flat(table, name, row):
    values = table[name][row].values
    return (values.flatten() if pa.types.is_list(values.type) else values).to_numpy(zero_copy_only=False)


def test_a_run_gives_the_same_table_again(llama):
    stage = make_stage(llama, batch_tokens=300)
    shard = shard_table(TEXTS)
    assert stage.run({"shard": shard}).table.equals(stage.run({"shard": shard}).table)


def test_only_train_rows_are_processed_in_their_order(llama):
    splits = ["train", "validation", "train", "validation", "train"]
    output = make_stage(llama).run({"shard": shard_table(TEXTS[:5], splits=splits)})
    assert output.table["doc_id"].to_pylist() == [100, 102, 104]
    assert output.table["segment"].to_pylist() == [0, 2, 1]
    assert output.health["segments"] == 3


def test_a_shard_without_train_rows_gives_an_empty_table(llama):
    output = make_stage(llama).run({"shard": shard_table(TEXTS[:2], splits=["validation"] * 2)})
    assert output.table.num_rows == 0
    assert output.table.schema.equals(logits_schema(Oracle(llama).tokenizer.vocabulary.size), check_metadata=True)
    assert output.num_tokens == 0


def logprobs_in_windows(oracle, ids):
    """Windows of 32 tokens, each but the first with BOS and 15 tokens of context."""
    expected = [oracle.logprobs(ids[:32])]
    taken = 32
    while taken < len(ids):
        end = min(len(ids), taken + 16)
        expected.append(oracle.logprobs([ids[0], *ids[end - 31 : end]])[-(end - taken) :])
        taken = end
    return np.concatenate(expected)


def test_a_long_segment_goes_in_overlapping_windows_with_bos(llama):
    text = "".join(TEXTS[:4])
    output = make_stage(llama, max_length=32).run({"shard": shard_table([text, "Short."])})
    oracle = Oracle(llama)
    ids = oracle.tokenizer.encode(text, is_last=True).ids
    assert len(ids) > 3 * 32
    assert oracle.tokenizer.num_prefix
    assert_row_agrees(output.table, 0, ids, logprobs_in_windows(oracle, ids))
    assert output.health["windowed_segments"] == 1
    assert output.num_tokens == output.health["tokens"] == sum(map(len, output.table["token_ids"]))


def test_a_model_with_fewer_positions_than_max_length_gets_windows(tmp_path):
    folder = save_model(tmp_path, architecture="opt", tokenizer_family="byte-bpe", max_positions=24)
    output = make_stage(folder, max_length=256).run({"shard": shard_table(TEXTS[:2])})
    oracle = Oracle(folder)
    ids = list_row(output.table, "token_ids", 0)
    assert output.health["windowed_segments"] == 2
    gold = list_row(output.table, "gold_logprob", 0)
    np.testing.assert_allclose(gold[:23], oracle.logprobs(ids[:24])[np.arange(23), ids[1:24]], atol=3e-5, rtol=1e-3)


def test_one_token_has_a_distribution_and_no_gold(tmp_path):
    folder = save_model(tmp_path, architecture="gpt_neox", tokenizer_family="byte-bpe")
    output = make_stage(folder).run({"shard": shard_table(["a"], is_last=False)})
    assert len(list_row(output.table, "token_ids", 0)) == 2  # EOS stands before the text, so that it is predicted
    assert output.table["gold_logprob"][0].as_py()[1] is None
    assert sparse_row(output.table, 0).ids.shape == (2, TOP_K)
    assert output.health["bits_per_byte"].count == 1


def test_a_segment_without_tokens_is_quarantined_and_the_others_stay(tmp_path):
    folder = save_model(tmp_path, architecture="llama", tokenizer_family="unigram")
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings.pop("eos_token")  # with it, EOS would stand before the text
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    output = make_stage(folder).run({"shard": shard_table(["fox", " \n ", "dog"], is_last=False)})
    assert output.table["doc_id"].to_pylist() == [100, 102]
    (bad,) = output.quarantine
    assert (bad.doc_id, bad.segment, bad.error) == (101, 1, "NoTokens")


def test_a_token_without_an_embedding_row_is_quarantined(tmp_path):
    folder = save_model(tmp_path, architecture="llama", tokenizer_family="byte-bpe", vocab_padding=-100)
    output = make_stage(folder).run({"shard": shard_table(TEXTS)})
    assert {record.error for record in output.quarantine} == {"TokenOutsideModel"}
    assert output.table.num_rows + len(output.quarantine) == len(TEXTS)
    assert "do tokenizer and weights belong together" in output.quarantine[0].message


def test_health_agrees_with_the_rows(llama):
    output = make_stage(llama).run({"shard": shard_table(TEXTS)})
    oracle = Oracle(llama)
    is_special = oracle.tokenizer.vocabulary.is_special
    nats = num_bytes = mass = 0
    for text in TEXTS:
        encoding = oracle.tokenizer.encode(text, is_last=True)
        logprobs = oracle.logprobs(encoding.ids)
        gold = np.append(logprobs[np.arange(len(encoding.ids) - 1), encoding.ids[1:]], np.nan)
        entropy = cross_entropy(gold, encoding.byte_end, is_special[encoding.ids])
        nats, num_bytes = nats + entropy.nats, num_bytes + entropy.num_bytes
        mass += np.exp(-np.sort(-logprobs, axis=1)[:, :TOP_K]).sum()
    health = output.health
    assert num_bytes == sum(len(text.encode()) for text in TEXTS)
    assert health["bits_per_byte"].count == num_bytes
    assert health["bits_per_byte"].value == pytest.approx(nats / math.log(2) / num_bytes, rel=1e-5)
    assert health["topk_mass"].total == pytest.approx(mass, rel=1e-4)
    assert health["topk_mass"].count == health["tokens"]
    assert (health["oom_retries"], health["windowed_segments"]) == (0, 0)


def test_logprobs_are_stored_in_half_precision_and_cross_entropy_stays(llama):
    output = make_stage(llama).run({"shard": shard_table(TEXTS)})
    for name in ("topk_logprobs", "gold_logprob"):
        values = np.concatenate([flat(output.table, name, row) for row in range(output.table.num_rows)])
        assert np.array_equal(values, round_to_half(values), equal_nan=True)
    oracle = Oracle(llama)
    exact, stored = [], []
    for row in range(output.table.num_rows):
        ids = list_row(output.table, "token_ids", row)
        exact.append(oracle.logprobs(ids)[np.arange(len(ids) - 1), ids[1:]])
        stored.append(list_row(output.table, "gold_logprob", row)[:-1])
    assert np.mean(np.concatenate(stored)) == pytest.approx(np.mean(np.concatenate(exact)), abs=1e-4)


def test_numbers_that_are_not_finite_are_refused_with_their_place(tmp_path):
    folder = save_model(tmp_path, architecture="llama", tokenizer_family="byte-bpe")
    tokenizer = SegmentTokenizer.load(ModelConfig(name="m", path=folder))
    ids = tokenizer.encode(TEXTS[3], is_last=True).ids
    earlier = {int(token) for text in TEXTS[:3] for token in tokenizer.encode(text, is_last=True).ids}
    position = next(index for index, token in enumerate(ids) if int(token) not in earlier)
    weights = load_file(folder / "model.safetensors")
    weights["model.embed_tokens.weight"][ids[position]] = math.nan
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    stage = make_stage(folder, batch_tokens=1)
    stage.run({"shard": shard_table(TEXTS[:3])})
    with pytest.raises(ValueError, match=rf"not finite at doc_id 103, segment 0, position \d+ of {len(ids)}"):
        stage.run({"shard": shard_table(TEXTS[:4])})


def test_bfloat16_is_near_float32(llama):
    shard = shard_table(TEXTS)
    half, full = (make_stage(llama, dtype=dtype).run({"shard": shard}) for dtype in ("bfloat16", "float32"))
    gap = half.health["bits_per_byte"].value - full.health["bits_per_byte"].value
    assert abs(gap) < 0.02 * full.health["bits_per_byte"].value
    assert half.table["token_ids"].equals(full.table["token_ids"])


def test_top_p_keeps_the_smallest_prefix_that_holds_it(llama):
    shard = {"shard": shard_table(TEXTS)}
    whole, cut = (make_stage(llama, top_p=top_p).run(shard) for top_p in (1.0, 0.6))
    num_shorter = 0
    for row in range(len(TEXTS)):
        every, kept = sparse_row(whole.table, row), sparse_row(cut.table, row)
        for position in range(len(every)):
            probs = np.exp(every.logprobs[position].astype(np.float64))
            if abs(probs.cumsum() - 0.6).min() < 1e-3:
                continue  # what is stored is rounded: the border may lie on either side
            expected = next((width for width in range(1, TOP_K) if probs[:width].sum() >= 0.6), TOP_K)
            num_shorter += expected < TOP_K
            width = (kept.ids[position] != PAD_ID).sum()
            assert width == expected
            assert np.array_equal(kept.ids[position, :width], every.ids[position, :width])
            assert np.array_equal(kept.logprobs[position, :width], every.logprobs[position, :width])
    assert num_shorter > 100
    entries = pa.compute.list_value_length(cut.table["topk_ids"].combine_chunks().flatten())
    assert cut.health["topk_entries"].value == pytest.approx(pa.compute.mean(entries).as_py())
    assert whole.health["topk_entries"].value == TOP_K
    assert 0.6 * 0.5 < cut.health["topk_mass"].value < whole.health["topk_mass"].value
    assert cut.table["gold_logprob"].equals(whole.table["gold_logprob"])


def test_seconds_of_the_model_are_part_of_the_stages(llama):
    health = make_stage(llama).run({"shard": shard_table(TEXTS)}).health
    assert 0 < health["forward_seconds"] <= health["stage_seconds"]


PATIENCE_SECONDS = 60


class WatchedBackend:
    """A backend that counts its callers, and holds the model until something happens outside it.

    Attributes:
        hold: number of a call -> the event that must come about during its forward pass.
        most_callers: that were ever in the model at once.
        num_calls: so far.
    """

    def __init__(self, backend):
        self._backend = backend
        self._callers = 0
        self.hold = {}
        self.most_callers = 0
        self.num_calls = 0

    def __getattr__(self, name):
        return getattr(self._backend, name)

    def predict(self, *arguments):
        self._callers += 1
        self.most_callers = max(self.most_callers, self._callers)
        event = self.hold.get(self.num_calls)
        self.num_calls += 1
        try:
            assert event is None or event.wait(PATIENCE_SECONDS), "the other shard waited for the model, outside it"
            return self._backend.predict(*arguments)
        finally:
            self._callers -= 1


def shards_of_texts():
    return [{"shard": shard_table(texts)} for texts in (TEXTS, [text[:30] for text in TEXTS], TEXTS[::-1])]


def overlapped(stage, shards):
    """Return the output or the error of each shard, two of them at once."""
    with ThreadPoolExecutor(2) as pool:
        futures = [pool.submit(stage.run, shard) for shard in shards]
        return [future.exception() or future.result() for future in futures]


def test_shards_that_overlap_have_the_rows_of_shards_one_after_the_other(llama):
    stage = make_stage(llama, batch_tokens=300)
    stage._backend = WatchedBackend(stage._backend)
    shards = shards_of_texts()
    expected = [stage.run(shard) for shard in shards]
    for output, other in zip(overlapped(stage, shards), expected, strict=True):
        assert output.table.equals(other.table)
        seconds = ("forward_seconds", "stage_seconds")
        assert {name: value for name, value in output.health.items() if name not in seconds} == {
            name: value for name, value in other.health.items() if name not in seconds
        }
    assert stage._backend.most_callers == 1


def test_a_shard_holds_the_model_only_during_its_forward_pass(llama, monkeypatch):
    """Each forward pass lasts until the other shard's host work is done: before its own pass, or after it."""
    stage = make_stage(llama)
    stage._backend = watched = WatchedBackend(stage._backend)
    is_tokenized, has_table = threading.Event(), threading.Event()
    watched.hold = {0: is_tokenized, 1: has_table}
    encode, table = stage._encode, stage._table
    num_encoded = []

    def tokenize(rows):
        segments = encode(rows)
        num_encoded.append(rows.num_rows)
        if len(num_encoded) == 2:
            is_tokenized.set()
        return segments

    def build_table(*arguments):
        try:
            return table(*arguments)
        finally:
            has_table.set()

    monkeypatch.setattr(stage, "_encode", tokenize)
    monkeypatch.setattr(stage, "_table", build_table)
    outputs = overlapped(stage, shards_of_texts()[:2])
    assert not [output for output in outputs if isinstance(output, BaseException)]
    assert (watched.num_calls, watched.most_callers) == (2, 1)


def test_a_shard_that_fails_does_not_disturb_a_shard_computed_at_the_same_time(llama, monkeypatch):
    stage = make_stage(llama)
    shards = shards_of_texts()[:2]
    expected = [stage.run(shard).table for shard in shards]
    stage._backend = watched = WatchedBackend(stage._backend)
    predict = watched._backend.predict

    def fail_first(sequences, *arguments):
        if watched.num_calls == 1:
            raise RuntimeError("the device was lost")
        return predict(sequences, *arguments)

    monkeypatch.setattr(watched._backend, "predict", fail_first)
    outputs = overlapped(stage, shards)
    (failed,) = [index for index, output in enumerate(outputs) if isinstance(output, BaseException)]
    assert "the device was lost" in str(outputs[failed])
    assert outputs[1 - failed].table.equals(expected[1 - failed])
    assert stage.run(shards[failed]).table.equals(expected[failed]), "the model is free again"


def test_memory_that_runs_out_for_one_shard_shrinks_the_batches_of_both(llama, monkeypatch):
    stage = make_stage(llama, batch_tokens=4096)
    shards = shards_of_texts()
    expected = [stage.run(shard).table for shard in shards]
    run = stage._backend._run

    def run_small(sequences, batch, *arguments):
        if len(batch) > 4:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return run(sequences, batch, *arguments)

    monkeypatch.setattr(stage._backend, "_run", run_small)
    outputs = overlapped(stage, shards)
    assert sum(output.health["oom_retries"] for output in outputs) >= 1
    assert stage._backend._batch_tokens < 4096
    for output, table in zip(outputs, expected, strict=True):
        for name in ("doc_id", "token_ids", "topk_ids"):
            assert output.table[name].equals(table[name])


def test_the_backend_is_recorded(llama):
    assert make_stage(llama).run({"shard": shard_table(TEXTS[:1])}).versions == {
        "backend": "transformers",
        "attention": "sdpa",
    }


# --- draws from the tail -------------------------------------------------------------------------------------------------


def test_draws_are_not_among_the_top_k_and_their_mass_is_reported(llama):
    output = make_stage(llama, tail_samples=5).run({"shard": shard_table(TEXTS)})
    oracle = Oracle(llama)
    schema = logits_schema(oracle.tokenizer.vocabulary.size, has_draws=True)
    assert output.table.schema.equals(schema, check_metadata=True)
    output.table.validate(full=True)
    tails = []
    for row in range(output.table.num_rows):
        draws, window = draws_row(output.table, row), sparse_row(output.table, row)
        assert draws.shape == (len(list_row(output.table, "token_ids", row)), 5)
        assert (draws >= 0).all()
        assert (np.diff(draws, axis=1) >= 0).all()
        assert not (draws[:, :, None] == window.ids[:, None, :]).any()
        logprobs = oracle.logprobs(list_row(output.table, "token_ids", row))
        tails.append(1 - np.exp(-np.sort(-logprobs.astype(np.float64), axis=1)[:, :TOP_K]).sum(axis=1))
    health = output.health
    assert health["tail_mass"].count == health["sampled_tail_mass"].count == health["tokens"]
    assert health["tail_mass"].value == pytest.approx(np.concatenate(tails).mean(), rel=1e-5)
    assert health["sampled_tail_mass"].value == pytest.approx(health["tail_mass"].value, rel=1e-3)
    assert health["tail_mass"].value == pytest.approx(1 - health["topk_mass"].value)


def test_nothing_else_changes_with_draws(llama):
    shard = {"shard": shard_table(TEXTS)}
    without, with_draws = (make_stage(llama, tail_samples=samples).run(shard) for samples in (0, 3))
    assert not has_draws(without.table)
    assert with_draws.table.drop_columns(["sample_ids"]).equals(without.table)
    added = {"tail_mass", "sampled_tail_mass"}
    assert with_draws.health.keys() - without.health.keys() == added
    assert "tail_samples" not in LogitsConfig().result_settings()
    assert LogitsConfig(tail_samples=3).result_settings()["tail_samples"] == 3


def test_a_recomputed_shard_has_the_same_draws_whatever_the_batches(llama):
    texts = [*TEXTS, *[text[:20] for text in TEXTS], "a"]
    shard = shard_table(texts)
    one = make_stage(llama, tail_samples=6, batch_tokens=1, chunk_positions=1).run({"shard": shard})
    many = make_stage(llama, tail_samples=6, batch_tokens=4096).run({"shard": shard})
    assert make_stage(llama, tail_samples=6).run({"shard": shard}).table.equals(many.table)
    # Logits of other batches differ in their last digit, so that a draw on a border may fall on its other side.
    left, right = (
        np.concatenate([flat(table, "sample_ids", row) for row in range(len(texts))])
        for table in (one.table, many.table)
    )
    assert (left == right).mean() > 0.999
    # A segment's draws do not depend on what else is in the shard.
    alone = make_stage(llama, tail_samples=6).run({"shard": shard.slice(3, 2)})
    assert alone.table["sample_ids"].to_pylist() == many.table["sample_ids"].to_pylist()[3:5]


def test_draws_lie_where_the_document_s_numbers_say_also_in_windows(llama):
    num_samples = 6
    shard = {"shard": shard_table(["Short.", "".join(TEXTS[:4])])}
    output = make_stage(llama, tail_samples=num_samples, max_length=32).run(shard)
    assert output.health["windowed_segments"] == 1
    oracle = Oracle(llama)
    ids = list_row(output.table, "token_ids", 1)
    rest = np.exp(logprobs_in_windows(oracle, ids).astype(np.float64))
    np.put_along_axis(rest, sparse_row(output.table, 1).ids.astype(np.int64), 0.0, axis=1)
    ends = np.cumsum(rest, axis=1) / rest.sum(axis=1, keepdims=True)
    starts = np.hstack([np.zeros((len(ids), 1)), ends[:, :-1]])
    random = np.random.Generator(np.random.Philox(key=[101, 1])).random((len(ids), num_samples))
    places = (np.arange(num_samples) + random) / num_samples
    drawn = draws_row(output.table, 1).astype(np.int64)
    assert (np.take_along_axis(starts, drawn, axis=1) - 1e-5 <= places).all()
    assert (places <= np.take_along_axis(ends, drawn, axis=1) + 1e-5).all()


def test_expected_row_of_many_documents_is_the_model_s_distribution(llama):
    num_copies, num_samples, positions = 300, 4, 12
    text = TEXTS[0][:40]
    output = make_stage(llama, tail_samples=num_samples, batch_tokens=4096).run(
        {"shard": shard_table([text] * num_copies)}
    )
    oracle = Oracle(llama)
    expected = np.exp(oracle.logprobs(list_row(output.table, "token_ids", 0)).astype(np.float64))
    total = np.zeros(expected.shape)
    for row in range(num_copies):
        window = sparse_row(output.table, row)
        ids, probs = add_draws(window.ids, np.exp(window.logprobs.astype(np.float64)), draws_row(output.table, row))
        dense = np.zeros((len(ids), expected.shape[1] + 1))  # the last column takes the pads
        np.put_along_axis(dense, ids.astype(np.int64), probs, axis=1)
        total += dense[:, :-1]
    mean = (total / num_copies)[:positions]
    tail = 1 - np.sort(expected, axis=1)[:, -TOP_K:].sum(axis=1)[:positions, None]
    # The variance of independent draws bounds that of stratified ones; a single draw of a rare token is no surprise.
    one = tail / (num_samples * num_copies)
    error = np.sqrt(expected[:positions] * one + one**2)
    z = (mean - expected[:positions]) / (error + 1e-3 * expected[:positions])
    assert np.abs(z).max() < 5.5
    assert (z**2).mean() < 1.3


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"backend": "vllm"}, "'vllm' returns only the largest entries: set backend = 'transformers'"),
        ({"backend": "server"}, "'server' returns only the largest entries: set backend = 'transformers'"),
        ({"top_p": 0.9}, "top_p = 0.9 would cut entries for which no draws stand"),
    ],
)
def test_draws_are_refused_where_there_is_no_full_distribution(settings, message):
    with pytest.raises(ValueError, match=message):
        LogitsConfig(tail_samples=2, **settings)
