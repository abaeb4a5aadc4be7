"""``ptafuse plan``: what is done, pending and stale, and why; measured figures where there are some."""

import json
import shutil
import socket
from pathlib import Path
from typing import Any

import pytest

from pipeline.forecast.changes import others_by_closeness, setting_changes
from pipeline.forecast.estimate import Assumed
from pipeline.forecast.forecaster import Forecast, forecast
from pipeline.forecast.sizes import count_parameters, dataset_size
from pipeline.run.resolve import resolve
from pipeline.run.steps import Request, ResolvedRun, Step
from pipeline.settings.load import load_config
from pipeline.settings.planning import AssumptionsConfig
from stages.contract.store import Store
from stages.models.config import ModelConfig
from tests.synthetic_run import SHARDED, TOKENS, fill, synthetic_run
from tests.tiny_models import split_weights
from tests.tiny_run import ptafuse

NUM_SHARDS = 10
LLAMA = "pipeline/configs/llama2_7b.toml"


def plan_json(config: Path | str, run: Path, *sets: str) -> dict[str, Any]:
    arguments = [part for one in sets for part in ("--set", one)]
    return json.loads(ptafuse("plan", str(config), "--run", str(run), "--json", *arguments).stdout)


def by_step(plan: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {step["step"]: step for step in plan["steps"]}


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("planning reaches for the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.mark.usefixtures("no_network")
def test_papers_run_is_planned_without_network(tmp_path: Path) -> None:
    shown = ptafuse("plan", LLAMA, "--run", str(tmp_path / "none")).stdout
    assert "5.9 GB in 1,000,000 documents, by the card of JeanKaddour/minipile" in shown
    assert "assumed: assumptions.gpu_forward_rate = 1.94e+14: Parameters times tokens" in shown
    assert "prices.gpu_hour=..." in shown
    assert not (tmp_path / "none").exists(), "planning records nothing"
    plan = plan_json(LLAMA, tmp_path / "none", "prices.gpu_hour=2", "prices.core_hour=0.1", "prices.gb_month=0.02")
    steps = by_step(plan)
    assert steps["logits/openllama"]["left"]["gpu_hours"] == pytest.approx(15, rel=0.01)
    assert steps["logits/mpt"]["left"]["gpu_hours"] == pytest.approx(1.5 * 15, rel=0.01), "it has eager attention alone"
    [warning] = plan["warnings"]
    assert warning.startswith("mpt runs with eager attention: transformers has neither SDPA nor FlashAttention for it")
    assert steps["logits/mpt"]["num_shards"] == 500
    assert steps["logits/mpt"]["num_tokens"] == pytest.approx(1.5e9, rel=0.01)
    assert all(
        step["state"] == "pending" and step["why"] == ["pending, never computed here"] for step in steps.values()
    )
    left = plan["left"]
    assert left["money"] == pytest.approx(2 * left["gpu_hours"] + 0.1 * left["core_hours"])
    assert left["gpu_hours"] == pytest.approx(sum(step["left"]["gpu_hours"] for step in steps.values()))
    assert plan["storage_money_per_month"] == pytest.approx(0.02 * plan["num_bytes"] / 1e9)
    assert all(value["source"] for value in plan["assumptions"].values())


@pytest.mark.usefixtures("no_network")
def test_the_run_on_conversations_is_planned_without_network(tmp_path: Path) -> None:
    shown = ptafuse("plan", "chat", "--run", str(tmp_path / "none")).stdout
    assert "207,865 documents" in shown
    plan = plan_json("chat", tmp_path / "none")
    steps = by_step(plan)
    assert plan["warnings"] == []
    assert steps["shard"]["num_shards"] == 416
    # 1.2 GB at 4.4 bytes a token: a source of 12 billion parameters takes half as long again as one of 8 billion.
    hours = {name: steps[f"logits/{name}"]["left"]["gpu_hours"] for name in ("qwen3", "gemma3")}
    assert hours["gemma3"] / hours["qwen3"] == pytest.approx(1.5, rel=0.01)


@pytest.fixture
def partly_done(tiny_config: Path, tmp_path: Path) -> tuple[ResolvedRun, Store]:
    store = Store(str(tmp_path / "run"))
    run = synthetic_run(tiny_config, store, NUM_SHARDS)
    fill(run, tmp_path / "run", {"shard": NUM_SHARDS, "logits/llama": NUM_SHARDS, "logits/neox": 4})
    return run, store


def again(run: ResolvedRun, store: Store, *overrides: str) -> Forecast:
    request = Request(run.request.config_path, (*run.request.overrides, *overrides))
    return forecast(resolve(load_config(request.config_path, request.overrides), store, request), store)


def test_what_is_left_follows_from_the_shards_that_are_done(partly_done: tuple[ResolvedRun, Store]) -> None:
    found = again(*partly_done)
    steps = {step.key: step for step in found.steps}
    assert found.sizes.source == "10 shards that are done"
    assert found.sizes.tokens["neox"] == NUM_SHARDS * TOKENS
    assert [steps[key].state for key in SHARDED] == ["done", "done", "pending", "pending", "pending"]
    neox = steps["logits/neox"]
    assert neox.why == ("4 of 10 shards are done",)
    assert neox.work.num_tokens_left == 6 * TOKENS
    assert neox.work.left.core_hours == pytest.approx(6 * 2.0 / 3600), "each done shard took a core 2 seconds"
    assert neox.work.spent.core_hours == pytest.approx(4 * 2.0 / 3600)
    assert neox.work.num_bytes == pytest.approx(10 * 100_000)
    assert neox.work.basis == "measured: 4 shards"
    assert steps["align/neox"].work.basis == "assumed"
    assert steps["align/neox"].work.num_tokens == NUM_SHARDS * TOKENS, "as the target's logits counted"
    assert steps["logits/llama"].work.left.core_hours == 0
    assert "gpu_forward_rate" not in found.assumptions


def test_changed_setting_makes_a_step_stale_and_is_named(partly_done: tuple[ResolvedRun, Store]) -> None:
    run, store = partly_done
    fill(run, Path(store.url), {"logits/neox": NUM_SHARDS, "align/neox": NUM_SHARDS, "fuse": NUM_SHARDS})
    found = {step.key: step for step in again(run, store, "align.epsilon=0.7").steps}
    align, fuse = found["align/neox"], found["fuse"]
    before = run.steps["align/neox"].fingerprint
    assert align.state == "stale"
    assert align.why == (
        f"there is {before} of tiny, with other settings: align.epsilon: {run.config.align.epsilon} -> 0.7",
    )
    assert align.work.basis == f"measured: 10 shards of {before}"
    assert align.work.left.core_hours == pytest.approx(10 * 2.0 / 3600)
    assert fuse.state == "stale"
    assert "its input align/neox is another one" in fuse.why[0]
    assert found["logits/neox"].state == "done"
    assert found["train"].state == "pending"


def test_results_of_another_configuration_are_mentioned_but_not_stale(partly_done: tuple[ResolvedRun, Store]) -> None:
    run, store = partly_done
    found = {step.key: step for step in again(run, store, "name=other", "logits.top_k=12").steps}
    assert found["logits/llama"].state == "pending"
    assert "of tiny, with other settings: logits.top_k: 10 -> 12" in found["logits/llama"].why[0]


def test_raised_code_version_is_named() -> None:
    changes = setting_changes({"align": {"epsilon": 0.5}, "version": 1}, {"align": {"epsilon": 0.5}, "version": 2})
    assert changes == ["the stage's code now computes different rows: version 1 -> 2"]


def test_closest_of_the_others_comes_first() -> None:
    def step(print_: str, **settings: object) -> Step:
        return Step("align/x", "align", "x", print_, {}, {"align": settings})

    now = step("now", epsilon=0.1, top_k=10)
    others = [
        step("far", epsilon=0.2, top_k=5),
        step("near", epsilon=0.2, top_k=10),
        step("late", epsilon=0.3, top_k=10),
    ]
    stranger = Step("fuse", "fuse", None, "near", {}, {})
    found = others_by_closeness(now, [*others, stranger, now, others[0]])
    assert [other.fingerprint for other in found] == ["late", "near", "far"]


def test_failed_shards_are_reported(partly_done: tuple[ResolvedRun, Store]) -> None:
    run, store = partly_done
    record = {"attempt": 2, "launch": "x", "host": "elsewhere", "pid": 1, "started": 2.0, "error": "ValueError: bad"}
    store.create(f"{run.steps['logits/neox'].folder}/attempts/shard-00004/2-00000000.json", json.dumps(record).encode())
    found = {step.key: step for step in again(run, store).steps}
    assert f"1 shards failed: `ptafuse retry {store.url}`" in "; ".join(found["logits/neox"].why)


@pytest.mark.slow
def test_finished_run_has_nothing_left(tiny_config: Path, undisturbed_run: Path) -> None:
    before = sorted(path.name for path in (undisturbed_run / "configs").iterdir())
    plan = plan_json(tiny_config, undisturbed_run)
    assert {step["state"] for step in plan["steps"]} == {"done"}
    assert plan["left"] == {"gpu_hours": 0, "core_hours": 0, "money": 0}
    assert by_step(plan)["align/neox"]["spent"]["core_hours"] > 0
    assert "everything is done" in ptafuse("plan", str(tiny_config), "--run", str(undisturbed_run)).stdout
    assert sorted(path.name for path in (undisturbed_run / "configs").iterdir()) == before


@pytest.mark.slow
def test_new_learning_rate_retrains_at_the_measured_speed(
    tiny_config: Path, undisturbed_run: Path, tmp_path: Path
) -> None:
    run = Path(shutil.copytree(undisturbed_run, tmp_path / "run"))
    steps = by_step(plan_json(tiny_config, run, "train.learning_rate=1e-4"))
    assert steps["train"]["state"] == "stale"
    assert steps["train"]["why"][0].endswith("train.learning_rate: 0.001 -> 0.0001")
    assert steps["train"]["basis"].startswith("measured: ")
    assert steps["eval/fused"]["state"] == "stale"
    assert steps["fuse"]["state"] == "done"


def test_speed_of_other_weights_is_not_taken_over(tiny_config: Path, undisturbed_run: Path) -> None:
    folder = tiny_config.parent
    sets = [f'target.path="{folder / "gemma"}"', "train.learning_rate=1e-4"]
    steps = by_step(plan_json(tiny_config, undisturbed_run, *sets))
    assert steps["train"]["basis"] == steps["logits/llama"]["basis"] == "assumed"
    assert steps["fuse"]["basis"].startswith("measured: ")  # no model runs there


def test_unknown_dataset_asks_for_its_size(tmp_path: Path) -> None:
    refused = ptafuse("plan", LLAMA, "--run", str(tmp_path), "--set", "dataset.hub=a/b", check=False)
    assert refused.returncode == 1
    assert "the size of a/b is unknown" in refused.stderr
    sets = ("dataset.hub=a/b", "assumptions.num_documents=4000", "assumptions.text_bytes=3.93e6")
    plan = plan_json(LLAMA, tmp_path, *sets)
    assert plan["text"]["tokens"]["llama2"] == pytest.approx(1e6)
    assert by_step(plan)["shard"]["num_shards"] == 2


@pytest.mark.parametrize(
    ("hub", "count"),
    [
        ("meta-llama/Llama-2-7b-hf", 7e9),
        ("openlm-research/open_llama_7b_v2", 7e9),
        ("HuggingFaceTB/SmolLM2-135M-Instruct", 135e6),
        ("Qwen/Qwen2.5-0.5B", 0.5e9),
        ("EleutherAI/pythia-1.4b-deduped", 1.4e9),
    ],
)
def test_parameters_by_name(hub: str, count: float) -> None:
    model = ModelConfig(name="x", hub=hub, revision="main")
    assert count_parameters(model, Assumed(AssumptionsConfig())).count == count
    given = Assumed(AssumptionsConfig(parameters={"x": 3.0}))
    assert count_parameters(model, given).count == 3


def test_parameters_of_a_nameless_model_are_asked_for() -> None:
    model = ModelConfig(name="x", hub="gpt2", revision="main")
    with pytest.raises(ValueError, match=r"--set assumptions.parameters.x=7e9"):
        count_parameters(model, Assumed(AssumptionsConfig()))


def test_parameters_of_local_weights_are_counted(tiny_config: Path) -> None:
    from transformers import AutoModelForCausalLM

    folder = tiny_config.parent / "neox"
    model = ModelConfig(name="x", path=folder)
    expected = AutoModelForCausalLM.from_pretrained(folder).num_parameters()
    assert count_parameters(model, Assumed(AssumptionsConfig())).count == expected


@pytest.mark.parametrize("other", ["consolidated.safetensors", "model.fp16.safetensors", "adapter_model.safetensors"])
def test_weights_that_lie_there_twice_are_counted_once(tiny_config: Path, tmp_path: Path, other: str) -> None:
    folder = Path(shutil.copytree(tiny_config.parent / "neox", tmp_path / "neox"))
    model = ModelConfig(name="x", path=folder)
    expected = count_parameters(model, Assumed(AssumptionsConfig())).count
    shutil.copy(folder / "model.safetensors", folder / other)
    assert count_parameters(model, Assumed(AssumptionsConfig())).count == expected
    first, second = split_weights(folder)
    assert {first, second} <= {file.name for file in folder.iterdir()}
    assert count_parameters(model, Assumed(AssumptionsConfig())).count == expected


def test_local_dataset_is_measured_by_its_files(tiny_config: Path) -> None:
    config = load_config(tiny_config)
    num_documents, num_bytes, source = dataset_size(config, Assumed(AssumptionsConfig()))
    assert num_documents == 24
    assert num_bytes == (tiny_config.parent / "corpus.jsonl").stat().st_size
    assert source.startswith("the files of ")
    part = load_config(tiny_config, ("dataset.max_documents=6",))
    assert dataset_size(part, Assumed(AssumptionsConfig()))[:2] == (6, num_bytes / 4)


def test_draws_from_the_tail_take_room(tiny_config: Path, tmp_path: Path) -> None:
    def entries(*overrides: str) -> dict[str, float]:
        store, request = Store(str(tmp_path / "none")), Request(str(tiny_config), overrides)
        found = forecast(resolve(load_config(tiny_config, overrides), store, request), store)
        work = {step.key: step.work for step in found.steps}
        rate = AssumptionsConfig().bytes_per_entry
        return {
            key: work[key].num_bytes / work[key].num_tokens / rate for key in ("logits/llama", "align/neox", "fuse")
        }

    assert entries() == pytest.approx({"logits/llama": 10, "align/neox": 10, "fuse": 10})
    drawn = entries("logits.tail_samples=6")
    assert drawn == pytest.approx({"logits/llama": 13, "align/neox": 16, "fuse": 22}), "fuse has those of two models"
