import pytest

from stages.models.config import ModelConfig
from train.config import TrainConfig
from train.job import StepRecord, TrainJob
from train.model.card import add_evaluation, model_card

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


def test_a_model_trained_on_gold_tokens_alone_is_not_said_to_have_read_fused_distributions():
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


def test_a_card_of_someone_else_is_left_alone(tmp_path):
    (tmp_path / "README.md").write_text("# my own\n")
    with pytest.raises(ValueError, match="not ptafuse's model card"):
        add_evaluation(tmp_path, [("fused", 1.0, 1)], dtype="float32")
    assert (tmp_path / "README.md").read_text() == "# my own\n"
