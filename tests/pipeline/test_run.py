"""A run from end to end: both runners, kills, changed settings, tampered files."""

import hashlib
import json
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path

import duckdb
import pyarrow.parquet as pq
import pytest

from tests.tiny_run import (
    NUM_DOCUMENTS,
    REPOSITORY,
    command,
    data_hashes,
    documents,
    environment,
    ptafuse,
    ptafuse_process,
    status,
)

NUM_SHARDS = NUM_DOCUMENTS // 4


def sharded(run: Path) -> dict[str, dict[int, str]]:
    return {folder: hashes for folder, hashes in data_hashes(run).items() if not folder.startswith("train")}


def copy_of(run: Path, folder: Path) -> Path:
    return Path(shutil.copytree(run, folder / "run"))


@pytest.mark.slow
def test_undisturbed_run_is_complete(undisturbed_run: Path) -> None:
    steps = status(undisturbed_run)
    assert set(steps) == {
        "shard", "logits/llama", "logits/neox", "align/neox", "fuse", "train", "eval/llama", "eval/neox", "eval/fused"
    }  # fmt: skip
    assert all(step["is_done"] for step in steps.values())
    assert all(shard["attempts"] == 1 for shard in steps["fuse"]["shards"])
    health = steps["align/neox"]["health"]
    assert 0 < health["covered"] <= health["positions"]


@pytest.mark.slow
def test_the_model_card_states_where_it_comes_from_and_what_was_evaluated(undisturbed_run: Path) -> None:
    (card,) = undisturbed_run.glob("train/*/model/README.md")
    text = card.read_text()
    for step in ("target llama before", "source neox", "this model"):
        assert re.search(rf"\| {step} \| \d+\.\d{{4}} \| [\d,]+ \|", text)
    for folder in ("shard", "logits/llama", "logits/neox", "align/neox", "fuse"):
        assert f'"{folder}": {{\n      "fingerprint"' in text


def test_segments_concatenate_to_the_documents(undisturbed_run: Path) -> None:
    folder = undisturbed_run / next(folder for folder in data_hashes(undisturbed_run) if folder.startswith("shard/"))
    texts = dict.fromkeys(range(NUM_DOCUMENTS), "")
    for file in sorted((folder / "data").glob("*.parquet")):
        for row in pq.read_table(file).to_pylist():
            assert row["byte_start"] == len(texts[row["doc_id"]].encode())
            texts[row["doc_id"]] += row["text"]
    assert list(texts.values()) == documents()


@pytest.mark.slow
def test_every_train_token_is_in_a_block(undisturbed_run: Path) -> None:
    glob = str(undisturbed_run / "{}/data/*.parquet")
    logits = duckdb.sql(f"select sum(len(token_ids)) from '{glob.format('logits/llama/*')}'").fetchall()[0]
    blocks = duckdb.sql(f"select sum(len(token_ids)) from '{glob.format('fuse/*')}'").fetchall()[0]
    assert logits == blocks
    assert logits[0] > 500


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.parametrize("num_workers", [1, 2])
def test_ray_gives_the_rows_of_the_in_process_runner(
    tiny_config: Path, undisturbed_run: Path, tmp_path: Path, num_workers: int
) -> None:
    run = tmp_path / "run"
    sets = [f"--set={stage}.num_workers={num_workers}" for stage in ("shard", "logits", "align", "fuse")]
    ptafuse_process("fuse", str(tiny_config), "--run", str(run), "--upstream", *sets)
    assert sharded(run) == sharded(undisturbed_run)
    assert shards_at_once(run, "logits/llama") == 2
    assert shards_at_once(run, "align/neox") == 1


@pytest.mark.slow
@pytest.mark.ray
def test_with_no_more_shards_left_than_workers_each_worker_has_one(
    tiny_config: Path, undisturbed_run: Path, tmp_path: Path
) -> None:
    """A worker that took both would leave a GPU without work."""
    run = Path(shutil.copytree(undisturbed_run, tmp_path / "run"))
    (folder,) = run.glob("logits/llama/*")
    shutil.rmtree(folder / "attempts")
    for shard in (0, 1):
        (folder / f"manifests/shard-{shard:05d}.json").unlink()
    ptafuse_process("logits", str(tiny_config), "--run", str(run), "--set=logits.num_workers=2")
    assert sharded(run) == sharded(undisturbed_run)
    assert sorted(path.name for path in folder.glob("attempts/*")) == ["shard-00000", "shard-00001"]
    assert shards_at_once(run, "logits/llama") == 1


def shards_at_once(run: Path, step: str) -> int:
    """Return the most shards of a step that one process had in flight."""
    (folder,) = run.glob(f"{step}/*")
    spans: dict[int, list[tuple[float, float]]] = {}
    for path in folder.glob("attempts/*/*.json"):
        record = json.loads(path.read_text())
        ended = (folder / "manifests" / f"{path.parent.name}.json").stat().st_mtime
        spans.setdefault(record["pid"], []).append((record["started"], ended))
    return max(
        sum(started <= begun < ended for started, ended in process)
        for process in spans.values()
        for begun, _ in process
    )


def training_of(run: Path) -> tuple[list[tuple[int, float]], str]:
    """(step, loss) of every logged step, and the hash of the trained weights."""
    folder = next(run.glob("train/*"))
    records = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    weights = hashlib.sha256((folder / "model" / "model.safetensors").read_bytes()).hexdigest()
    return [(record["step"], record["loss"]) for record in records], weights


@pytest.mark.slow
@pytest.mark.ray
def test_worker_killed_once_in_each_stage(tiny_config: Path, undisturbed_run: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    fault = f"die:*:2:{tmp_path}"
    ptafuse_process("train", str(tiny_config), "--run", str(run), "--upstream", PTAFUSE_FAULT=fault)
    assert sharded(run) == sharded(undisturbed_run)
    assert (tmp_path / "die-train").exists()
    assert training_of(run) == training_of(undisturbed_run)
    for key, step in status(run).items():
        if key.startswith(("train", "eval")):
            continue
        assert (tmp_path / f"die-{key.replace('/', '-')}").exists()
        attempts = {shard["shard"]: shard["attempts"] for shard in step["shards"]}
        assert attempts[2] == 2, f"{key}: the killed attempt and the one that replaced it"
        again = [shard for shard, count in attempts.items() if shard != 2 and count != 1]
        in_flight = 1 if key.startswith("logits") else 0  # beside the killed shard, in the same worker
        assert len(again) <= in_flight, f"{key}: no other shard computed twice"
        assert all(attempts[shard] == 2 for shard in again)


@pytest.mark.slow
@pytest.mark.ray
def test_driver_killed_in_each_stage(tiny_config: Path, undisturbed_run: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    arguments = command("train", str(tiny_config), "--run", str(run), "--upstream")
    for stage in ("shard", "logits", "align", "fuse", "train"):
        env = environment(PTAFUSE_FAULT=f"block:{stage}:3:{tmp_path}")
        with subprocess.Popen(
            arguments, cwd=REPOSITORY, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        ) as driver:
            _wait_for_marker(tmp_path, f"block-{stage}*", driver)
            driver.send_signal(signal.SIGKILL)
        done_before = {key: {s["shard"]: s for s in step["shards"] if s["sha256"]} for key, step in status(run).items()}
    ptafuse_process("train", str(tiny_config), "--run", str(run), "--upstream")
    assert sharded(run) == sharded(undisturbed_run)
    assert training_of(run) == training_of(undisturbed_run)
    after = {key: {s["shard"]: s for s in step["shards"]} for key, step in status(run).items()}
    for key, shards in done_before.items():
        for number, shard in shards.items():
            assert after[key][number] == shard, f"{key} shard {number} was done before the kill and is untouched"


def _wait_for_marker(folder: Path, pattern: str, driver: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 120
    while not list(folder.glob(pattern)):
        assert driver.poll() is None, f"the driver ended before {pattern}"
        assert time.monotonic() < deadline, f"no {pattern} in two minutes"
        time.sleep(0.05)


@pytest.mark.slow
def test_finished_stage_says_nothing_to_do(tiny_config: Path, undisturbed_run: Path, tmp_path: Path) -> None:
    run = copy_of(undisturbed_run, tmp_path)
    before = data_hashes(run)
    done = ptafuse("eval", str(tiny_config), "--run", str(run), "--upstream")  # without --local: Ray is not started
    for key in ("shard", "logits/llama", "logits/neox", "align/neox", "fuse", "train", "eval"):
        assert f"{key}: nothing to do" in done.stdout
    assert data_hashes(run) == before


@pytest.mark.slow
def test_changed_epsilon_recomputes_only_align_and_fuse(
    tiny_config: Path, undisturbed_run: Path, tmp_path: Path
) -> None:
    run = copy_of(undisturbed_run, tmp_path)
    done = ptafuse("fuse", str(tiny_config), "--run", str(run), "--local", "--upstream", "--set", "align.epsilon=0.5")
    for key in ("shard", "logits/llama", "logits/neox"):
        assert f"{key}: nothing to do" in done.stdout
    new = set(data_hashes(run)) - set(data_hashes(undisturbed_run))
    assert sorted(folder.split("/")[0] for folder in new) == ["align", "fuse"]


@pytest.mark.slow
def test_added_source_computes_its_own_logits_and_alignment_only(
    tiny_config: Path, undisturbed_run: Path, tmp_path: Path
) -> None:
    run = copy_of(undisturbed_run, tmp_path)
    ptafuse("fuse", str(with_source(tiny_config, tmp_path, "gemma")), "--run", str(run), "--local", "--upstream")
    new = set(data_hashes(run)) - set(data_hashes(undisturbed_run))
    assert sorted(folder.rsplit("/", 1)[0] for folder in new) == ["align/gemma", "fuse", "logits/gemma"]
    ptafuse("align", str(tiny_config), "--run", str(run), "--local")  # and without it again: nothing is lost
    assert set(data_hashes(undisturbed_run)) < set(data_hashes(run))


@pytest.mark.slow
@pytest.mark.parametrize("damage", ["truncated", "tampered", "missing"])
def test_damaged_file_is_noticed_and_repaired(
    tiny_config: Path, undisturbed_run: Path, tmp_path: Path, damage: str
) -> None:
    run = copy_of(undisturbed_run, tmp_path)
    shutil.rmtree(run / "align")
    victim = sorted(run.glob("logits/neox/*/data/*.parquet"))[1]
    raw = victim.read_bytes()
    if damage == "missing":
        victim.unlink()
    else:
        middle = len(raw) // 2
        victim.write_bytes(raw[:-30] if damage == "truncated" else raw[:middle] + b"x" + raw[middle + 1 :])
    refused = ptafuse("align", str(tiny_config), "--run", str(run), "--local", check=False)
    assert refused.returncode == 1
    assert victim.name in refused.stderr
    assert "verify" in refused.stderr
    found = ptafuse("verify", str(run), check=False)
    assert found.returncode == 1
    ptafuse("verify", str(run), "--repair")
    ptafuse("retry", str(run))
    ptafuse("fuse", str(tiny_config), "--run", str(run), "--local", "--upstream")
    assert sharded(run) == sharded(undisturbed_run)
    assert ptafuse("verify", str(run)).returncode == 0


@pytest.mark.slow
def test_status_of_a_half_done_stage_names_the_next_command(
    tiny_config: Path, undisturbed_run: Path, tmp_path: Path
) -> None:
    run = copy_of(undisturbed_run, tmp_path)
    for manifest in sorted(run.glob("align/neox/*/manifests/*.json"))[3:]:
        manifest.unlink()
    shown = ptafuse("status", str(run)).stdout
    assert f"next: `make align CONFIG={tiny_config} RUN={run}`" in shown.replace("\n", "")
    assert f"3/{NUM_SHARDS}" in shown
    refused = ptafuse("fuse", str(tiny_config), "--run", str(run), "--local", check=False)
    assert refused.returncode == 1
    assert f"align/neox is incomplete (3 of {NUM_SHARDS} shards)" in refused.stderr


@pytest.mark.slow
def test_shard_that_always_fails_is_tried_three_times_then_named(
    tiny_config: Path, undisturbed_run: Path, tmp_path: Path
) -> None:
    run = copy_of(undisturbed_run, tmp_path)
    shutil.rmtree(run / "fuse")
    victim = sorted(run.glob("align/neox/*/data/*.parquet"))[0]
    victim.write_bytes(b"not Parquet")
    refused = ptafuse("fuse", str(tiny_config), "--run", str(run), "--local", check=False)
    assert refused.returncode == 1
    assert f"fuse: 1 of {NUM_SHARDS} shards failed:" in refused.stderr
    assert victim.name in refused.stderr
    step = status(run)["fuse"]
    assert step["num_done"] == NUM_SHARDS - 1
    failed = next(shard for shard in step["shards"] if shard["state"] == "failed")
    assert failed["attempts"] == 3
    again = ptafuse("fuse", str(tiny_config), "--run", str(run), "--local", check=False)
    assert again.returncode == 1
    assert status(run)["fuse"] == step, "a failed shard stays failed until `ptafuse retry`"


@pytest.mark.slow
def test_parquet_of_every_stage_opens_in_duckdb_pandas_and_datasets(undisturbed_run: Path) -> None:
    import pandas as pd
    from datasets import load_dataset

    queries = {
        "shard/*": "select count(*) from {} where split = 'train'",
        "logits/llama/*": "select avg(-g) from (select unnest(gold_logprob) as g from {}) where g is not null",
        "align/neox/*": "select count(*) from (select unnest(exact_context) as e from {}) where e",
        "fuse/*": "select count(*) from (select unnest(topk_logprobs) as row from {}) where len(row) > 0",
    }
    for folder, query in queries.items():
        value = duckdb.sql(query.format(f"'{undisturbed_run}/{folder}/data/*.parquet'")).fetchall()[0][0]
        assert value > 0, folder
        files = sorted(undisturbed_run.glob(f"{folder}/data/*.parquet"))
        assert len(pd.read_parquet(files[0])) == pq.read_metadata(files[0]).num_rows
        rows = load_dataset(
            "parquet",
            data_files=[str(file) for file in files],
            split="train",
            cache_dir=str(files[0].parent.parent / "cache"),
        )
        assert len(rows) == sum(pq.read_metadata(file).num_rows for file in files)


@pytest.mark.slow
def test_no_file_is_left_that_no_manifest_names(undisturbed_run: Path) -> None:
    named = set()
    for path in undisturbed_run.glob("**/manifests/shard-*.json"):
        named.add(json.loads(path.read_text())["data"]["key"])
    on_disk = {str(path.relative_to(undisturbed_run)) for path in undisturbed_run.glob("**/data/*")}
    assert on_disk == named


def with_source(tiny_config: Path, folder: Path, name: str) -> Path:
    """Return the tiny configuration with one more source."""
    toml = folder / "more.toml"
    source = f'[[sources]]\nname = "{name}"\npath = "{tiny_config.parent}/{name}"\n\n[shard]'
    toml.write_text(tiny_config.read_text().replace("[shard]", source))
    return toml


@pytest.mark.slow
def test_unfinished_shards_of_other_tokenizers_are_not_taken_up(tiny_config: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    ptafuse("shard", str(with_source(tiny_config, tmp_path, "gemma")), "--run", str(run), "--local")
    for manifest in sorted(run.glob("shard/*/manifests/*.json"))[::2]:
        manifest.unlink()
    before = data_hashes(run)
    ptafuse("shard", str(tiny_config), "--run", str(run), "--local")
    after = data_hashes(run)
    assert len(after) == 2
    assert before.items() <= after.items(), "the other configuration's shards are as they were"


@pytest.mark.slow
def test_removed_source_takes_up_the_finished_shards(tiny_config: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    ptafuse("shard", str(with_source(tiny_config, tmp_path, "gemma")), "--run", str(run), "--local")
    done = ptafuse("shard", str(tiny_config), "--run", str(run), "--local")
    assert "shard: nothing to do" in done.stdout


@pytest.mark.slow
def test_order_of_sources_names_another_fuse_folder(tiny_config: Path, undisturbed_run: Path, tmp_path: Path) -> None:
    from pipeline.run.resolve import resolve
    from pipeline.run.steps import Request
    from pipeline.settings.load import load_config
    from stages.contract.store import Store

    config = load_config(with_source(tiny_config, tmp_path, "gemma"))
    swapped = config.model_copy(update={"sources": config.sources[::-1]})
    store, request = Store(str(undisturbed_run)), Request("x")
    one, other = resolve(config, store, request).steps, resolve(swapped, store, request).steps
    assert one["fuse"].fingerprint != other["fuse"].fingerprint
    assert one["align/gemma"].fingerprint == other["align/gemma"].fingerprint


@pytest.mark.slow
def test_allowing_more_bad_records_recomputes_nothing(tiny_config: Path, undisturbed_run: Path, tmp_path: Path) -> None:
    run = copy_of(undisturbed_run, tmp_path)
    done = ptafuse("logits", str(tiny_config), "--run", str(run), "--local", "--set", "logits.max_bad_fraction=0.5")
    assert done.stdout.count("nothing to do") == 2


@pytest.mark.slow
def test_damaged_model_is_noticed(tiny_config: Path, undisturbed_run: Path, tmp_path: Path) -> None:
    run = copy_of(undisturbed_run, tmp_path)
    weights = next(run.glob("train/*/model/model.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    found = ptafuse("verify", str(run), check=False)
    assert found.returncode == 1
    assert "model.safetensors is not the file that was written" in found.stdout
    weights.unlink()
    refused = ptafuse("train", str(tiny_config), "--run", str(run), "--local", check=False)
    assert refused.returncode == 1
    assert "model.safetensors of its model is missing" in refused.stderr
    ptafuse("verify", str(run), "--repair")
    ptafuse("train", str(tiny_config), "--run", str(run), "--local")
    assert training_of(run) == training_of(undisturbed_run)


@pytest.mark.slow
def test_eval_before_training_evaluates_the_other_models(
    tiny_config: Path, undisturbed_run: Path, tmp_path: Path
) -> None:
    run = copy_of(undisturbed_run, tmp_path)
    shutil.rmtree(run / "train")
    shutil.rmtree(run / "eval")
    early = ptafuse("eval", str(tiny_config), "--run", str(run), "--local", check=False)
    assert early.returncode == 1
    assert "eval/neox:" in early.stdout
    assert "train is not complete: run `make train" in early.stderr


@pytest.mark.slow
def test_library_drift_warns_and_strict_refuses(
    tiny_config: Path, undisturbed_run: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = copy_of(undisturbed_run, tmp_path)
    manifests = sorted(run.glob("fuse/*/manifests/*.json"))
    manifests[-1].unlink()
    manifest = json.loads(manifests[0].read_text())
    manifest["versions"]["numpy"] = "1.0"
    manifests[0].write_text(json.dumps(manifest))
    refused = ptafuse("fuse", str(tiny_config), "--run", str(run), "--local", "--strict", check=False)
    assert refused.returncode == 1
    assert "numpy 1.0 -> " in refused.stderr
    ptafuse("fuse", str(tiny_config), "--run", str(run), "--local")
    assert "numpy 1.0 -> " in caplog.text


@pytest.mark.slow
def test_a_failed_set_up_is_reported_once_and_costs_no_attempt(
    tiny_config: Path, undisturbed_run: Path, tmp_path: Path
) -> None:
    run = copy_of(undisturbed_run, tmp_path)
    shutil.rmtree(run / "logits" / "neox")
    refused = ptafuse(
        "logits", str(tiny_config), "--run", str(run), "--local", "--set", "logits.device=cuda", check=False
    )
    assert refused.returncode == 1
    assert refused.stderr.count("torch sees no GPU here") == 1
    assert all(shard["attempts"] == 0 for shard in status(run)["logits/neox"]["shards"])


@pytest.mark.slow
def test_status_shows_an_error_that_looks_like_markup(tiny_config: Path, undisturbed_run: Path, tmp_path: Path) -> None:
    run = copy_of(undisturbed_run, tmp_path)
    folder = next(run.glob("fuse/*"))
    (folder / "manifests" / "shard-00002.json").unlink()
    attempt = next((folder / "attempts" / "shard-00002").glob("*.json"))
    attempt.write_text(json.dumps({**json.loads(attempt.read_text()), "error": "ValueError: [/INST] is bad"}))
    shown = ptafuse("status", str(run)).stdout
    assert "fuse shard 2 failed: ValueError: [/INST] is bad" in shown
    assert "next: `ptafuse retry" in shown
