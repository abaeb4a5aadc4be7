import math

import numpy as np
import pytest

from stages.measures.kinds import kind_figures
from stages.measures.standard_error import Estimate
from stages.models.config import ModelConfig
from train.config import TrainConfig
from train.job import StepRecord, TrainJob
from train.model.card import PairedDifferences, TextFigures, TextRow, add_evaluation, model_card

RECORD = StepRecord(
    step=3, num_steps=3, epoch=0, loss=2.5, loss_clm=2.0, loss_fusion=None, learning_rate=1e-5, grad_norm=1.0,
    num_tokens=100, tokens_per_second=5.0, data_wait_share=0.0, blocks=[0], lambda_=0.8, peak_memory_gb=1.0, mfu=None,
)  # fmt: skip


def card() -> str:
    return card_of(TrainConfig(temperature=1.25))


def card_of(config: TrainConfig) -> str:
    model = ModelConfig(name="tiny", hub="someone/tiny", revision="abc")
    provenance = {"dataset": {"hub": "some/texts"}, "stages": {"align": {"fingerprint": "feedc0ffee00"}}}
    return model_card(TrainJob(config, model, (), "out", "0123456789ab", ("gemma",), provenance), RECORD)


def test_the_card_states_what_the_model_was_made_of():
    text = card()
    for part in ("tiny, someone/tiny (revision abc)", "- gemma", "`0123456789ab`", "some/texts", "feedc0ffee00"):
        assert part in text
    assert '"temperature": 1.25' in text
    assert "| loss_clm | 2.0000 |" in text
    assert "loss_fusion |" not in text
    assert "`ptafuse eval`" in text


def test_the_card_of_a_model_trained_only_on_gold_tokens_mentions_no_fused_distributions():
    words = "The fused distributions were not read"
    assert words in card_of(TrainConfig.model_validate({"lambda": 1.0}))
    falling = {"lambda": 1.0, "lambda_schedule": "linear", "lambda_end": 0.0}
    assert words not in card_of(TrainConfig.model_validate(falling))
    assert words not in card()


def test_evaluation_fills_its_section_and_may_do_so_again(tmp_path):
    (tmp_path / "README.md").write_text(card())
    add_evaluation(tmp_path, [("fused", 1.03, 5000)], dtype="float32")
    add_evaluation(tmp_path, [("target before", 1.1, 5000), ("fused", 1.02, 5000)], dtype="float32")
    text = (tmp_path / "README.md").read_text()
    assert "| fused | 1.0200 | 5,000 |" in text
    assert "1.0300" not in text
    assert "Not evaluated" not in text
    assert text.split("## Settings")[1] == card().split("## Settings")[1]
    assert [path.name for path in tmp_path.iterdir()] == ["README.md"]
    assert "end by themselves" not in text
    add_evaluation(
        tmp_path, [("fused", 1.02, 5000)], dtype="float32", endings=[("target before", 9, 20), ("fused", 20, 20)]
    )
    shown = "Greedy answers to held-out prompts that end by themselves: target before: 9 of 20; fused: 20 of 20."
    assert shown in (tmp_path / "README.md").read_text()


def test_a_model_card_that_is_not_ours_is_left_alone(tmp_path):
    (tmp_path / "README.md").write_text("# my own\n")
    with pytest.raises(ValueError, match="not ptafuse's model card"):
        add_evaluation(tmp_path, [("fused", 1.0, 1)], dtype="float32")
    assert (tmp_path / "README.md").read_text() == "# my own\n"


def test_each_text_has_a_table_of_the_columns_that_hold_something(tmp_path):
    (tmp_path / "README.md").write_text(card())
    kinds = kind_figures(np.array([1.0, 2.0, 6.0]), np.array([300.0, 100.0, 10.0]), ["a", "a", "b"])
    differences = kind_figures(np.array([-0.5, -0.3, 0.1, 0.1]), np.full(4, 10.0), ["a", "a", "b", "b"])
    against = PairedDifferences(Estimate(-0.25, 0.125), differences)
    rows = (TextRow("target x before", 1.5, kinds, None, None), TextRow("this model", 1.25, kinds, against, None))
    plain = (TextRow("this model", 2.0, None, PairedDifferences(Estimate(0.5, math.nan), None), None),)
    texts = [TextFigures("news", "3 of 4 chosen documents", rows), TextFigures("code", "1 of 1", plain)]
    add_evaluation(tmp_path, [("this model", 1.03, 5000)], dtype="float32", texts=texts)
    text = (tmp_path / "README.md").read_text()
    assert "Text news: 3 of 4 chosen documents. " in text
    assert (
        "| model | bits per byte | against target before | average over kinds | kinds against target before | kinds won |\n"
        "| --- | --- | --- | --- | --- | --- |\n"
        "| target x before | 1.5000 |  | 3.6250 |  |  |\n"
        "| this model | 1.2500 | -0.2500 ± 0.1250 | 3.6250 | -0.1500 ± 0.0500 | 1 of 2 |\n"
    ) in text
    assert "| this model | 2.0000 | +0.5000 |\n" in text
    assert text.split("## Settings")[1] == card().split("## Settings")[1]
    add_evaluation(tmp_path, [("this model", 1.03, 5000)], dtype="float32")
    assert "news" not in (tmp_path / "README.md").read_text()
