"""Which run "against gold only" compares with: the same training but for the fused distributions, and no other."""

import typing
from pathlib import Path

import pytest

from pipeline.evaluation.gold_only import FUSION_SETTINGS, is_gold_only
from pipeline.report.held_out import HeldOutRow, held_out, held_out_table
from pipeline.run.stage_table import FUSED
from pipeline.settings.load import load_config
from stages.contract.fingerprint import RUNTIME
from stages.contract.store import Store
from tests.pipeline.report.finished_runs import begin, evaluation, finish, put
from tests.tiny_run import ptafuse
from train.config import TrainConfig

GOLD_SETTINGS = {
    "isolate_documents",
    "batch_size",
    "num_epochs",
    "learning_rate",
    "warmup_ratio",
    "schedule",
    "adam_beta1",
    "adam_beta2",
    "weight_decay",
    "clip_norm",
    "lora",
    "autocast",
    "seed",
}
"""What training on the gold tokens alone reads."""


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(str(tmp_path / "run"))


def row_of(rows: typing.Sequence[HeldOutRow], name: str) -> HeldOutRow:
    (found,) = [row for row in rows if row.label.startswith(f"after {name} (")]
    return found


def test_every_setting_of_training_is_the_gold_tokens_or_the_fusion_loss_s_own_or_changes_nothing() -> None:
    fields = {field.alias or name: field for name, field in TrainConfig.model_fields.items()}
    runtime = {name for name, field in fields.items() if RUNTIME in field.metadata}
    assert sorted([*GOLD_SETTINGS, *FUSION_SETTINGS, *runtime]) == sorted(fields)


@pytest.mark.parametrize(
    "setting",
    [
        "train.num_epochs=2",
        "train.learning_rate=2e-3",
        "train.batch_size=8",
        "train.seed=7",
        "train.isolate_documents=true",
        "train.lora.r=4",
        "fuse.max_length=128",
        "fuse.packing=cut",
        "shard.max_length=32",
        "shard.validation_fraction=0.3",
        "eval.max_length=32",
        "eval.max_documents=2",
        "target.bos=false",
    ],
)
def test_a_run_on_gold_tokens_that_differs_in_what_they_teach_is_no_reference(
    store: Store, tiny_config: Path, setting: str
) -> None:
    runs = [
        finish(store, tiny_config, "name=gold", "train.lambda=1.0"),
        finish(store, tiny_config, "name=fused", setting, figure=0.9),
    ]
    assert row_of(held_out(runs, store), "fused").against_gold_only is None


@pytest.mark.parametrize(
    "setting",
    [
        "train.temperature=2.0",
        "train.fusion_loss=reverse-kl",
        "train.tail_loss=gold",
        "train.num_workers=2",
        "train.checkpoint_every_steps=7",
        "align.epsilon=0.7",
        "align.support=target",
        "fuse.function=avg-ce",
        "fuse.top_k=5",
        "logits.top_k=11",
        "logits.dtype=bfloat16",
    ],
)
def test_a_run_that_differs_only_in_the_fused_distributions_is_compared(
    store: Store, tiny_config: Path, setting: str
) -> None:
    runs = [
        finish(store, tiny_config, "name=gold", "train.lambda=1.0"),
        finish(store, tiny_config, "name=fused", setting, figure=0.9),
    ]
    found = row_of(held_out(runs, store), "fused").against_gold_only
    assert found is not None
    assert found.mean == pytest.approx(-0.1)


def test_the_reference_is_chosen_by_its_settings_not_by_its_place(store: Store, tiny_config: Path) -> None:
    runs = [
        finish(store, tiny_config, "name=other-seed", "train.lambda=1.0", "train.seed=1", figure=3.0),
        finish(store, tiny_config, "name=fused", figure=0.9),
        finish(store, tiny_config, "name=gold", "train.lambda=1.0"),
    ]
    rows = held_out(runs, store)
    found = row_of(rows, "fused").against_gold_only
    assert found is not None
    assert found.mean == pytest.approx(-0.1)
    assert row_of(rows, "other-seed").against_gold_only is None


def test_a_schedule_that_leaves_1_is_not_gold_only(store: Store, tiny_config: Path) -> None:
    linear = ("train.lambda=1.0", "train.lambda_schedule=linear")
    runs = [
        finish(store, tiny_config, "name=falling", *linear, "train.lambda_end=0.0", figure=0.9),
        finish(store, tiny_config, "name=fused", figure=0.8),
        finish(store, tiny_config, "name=level", *linear, "train.lambda_end=1.0"),
    ]
    assert [is_gold_only(run) for run in runs] == [False, False, True]
    rows = held_out(runs, store)
    assert row_of(rows, "falling").label == "after falling (lambda 1.0 to 0.0, semi-relaxed)"
    assert row_of(rows, "level").label == "after level (gold tokens only)"
    for name, difference in (("falling", -0.1), ("fused", -0.2)):
        found = row_of(rows, name).against_gold_only
        assert found is not None
        assert found.mean == pytest.approx(difference)


def test_the_table_says_which_run_is_missing_in_a_command_that_gives_it(store: Store, tiny_config: Path) -> None:
    gold = finish(store, tiny_config, "name=gold", "train.lambda=1.0")
    fused = finish(store, tiny_config, "name=fused", "train.num_epochs=2", "train.lambda=0.5", figure=0.9)
    (note,) = held_out_table(held_out([gold, fused], store)).notes
    assert note.startswith("against gold only: after fused (lambda 0.5, semi-relaxed) ")
    sets = ("train.num_epochs=2", "name=fused-gold-only", "train.lambda=1")
    command = f"ptafuse eval {tiny_config} --run {store.url} --upstream " + " ".join(f"--set {one}" for one in sets)
    assert note.endswith(f"`{command}`")
    given = [*sets]
    assert is_gold_only(begin(store, tiny_config, *given))
    reference = finish(store, tiny_config, *given, figure=0.95)
    table = held_out_table(held_out([gold, fused, reference], store))
    assert table.notes == ()
    found = row_of(held_out([gold, fused, reference], store), "fused").against_gold_only
    assert found is not None
    assert found.mean == pytest.approx(-0.05)


def test_a_missing_run_that_was_begun_is_named_by_its_own_settings(store: Store, tiny_config: Path) -> None:
    runs = [
        begin(store, tiny_config, "name=begun", "train.lambda=1.0"),
        finish(store, tiny_config, "name=fused", figure=0.9),
    ]
    (note,) = held_out_table(held_out(runs, store)).notes
    assert note.endswith("--set name=begun --set train.lambda=1.0`")


def test_a_schedule_of_the_file_ends_at_1_in_the_command(store: Store, tiny_config: Path, tmp_path: Path) -> None:
    path = tmp_path / "falling.toml"
    schedule = '[train]\nlambda_schedule = "linear"\nlambda_end = 0.5\n'
    path.write_text(tiny_config.read_text().replace("[train]\n", schedule))
    (note,) = held_out_table(held_out([finish(store, path)], store)).notes
    sets = note.removesuffix("`").split(" --set ")[1:]
    assert not load_config(path, tuple(sets)).train.uses_fusion


def test_a_baseline_is_compared_where_the_runs_that_evaluate_it_train_alike(store: Store, tiny_config: Path) -> None:
    ensemble = "baselines.ensemble=true"
    runs = [
        finish(store, tiny_config, "name=gold", "train.lambda=1.0", ensemble),
        finish(store, tiny_config, "name=fused", ensemble, figure=0.9),
    ]
    put(store, runs[0], "ensemble", evaluation([0.7, 0.7], [100, 100]))

    def difference() -> float | None:
        (row,) = [row for row in held_out(runs, store) if row.label.startswith("ensemble")]
        return None if row.against_gold_only is None else row.against_gold_only.mean

    assert difference() == pytest.approx(-0.3)
    runs.append(finish(store, tiny_config, "name=longer", "train.num_epochs=2", ensemble, figure=0.8))
    assert difference() is None, "which training would it be compared with?"
    assert runs[0].steps[f"eval/{FUSED}"].folder != runs[2].steps[f"eval/{FUSED}"].folder


def test_the_terminal_and_the_page_say_which_run_is_missing(store: Store, tiny_config: Path, tmp_path: Path) -> None:
    finish(store, tiny_config, "name=fused", figure=0.9)
    page = tmp_path / "page.html"
    shown = ptafuse("report", store.url, "--html", str(page)).stdout
    command = f"ptafuse eval {tiny_config} --run {store.url} --upstream --set name=fused-gold-only --set train.lambda=1"
    assert command in shown, "in one line, so that it can be copied"
    assert command in page.read_text()
