"""Recorded configurations: those of earlier versions are read as they were meant."""

import json
from pathlib import Path

from pipeline.run.records import recorded_run
from stages.contract.store import Store
from tests.synthetic_run import synthetic_run


def test_the_default_split_of_an_earlier_version_chooses_no_files(tiny_config: Path, tmp_path: Path) -> None:
    """It was recorded as "train", also beside a path, where it was not read."""
    store = Store(str(tmp_path / "run"))
    (tmp_path / "news.jsonl").write_text('{"text": "news"}\n')
    text = f'[{{name = "news", path = "{tmp_path}/news.jsonl"}}, {{name = "hub", hub = "a/b", revision = "c", split = "test"}}]'
    run = synthetic_run(tiny_config, store, 2, overrides=(f"eval.texts={text}",))
    assert recorded_run(store) == run
    path = tmp_path / "run" / run.record_key
    value = json.loads(path.read_text())
    for dataset in (value["config"]["dataset"], *value["config"]["eval"]["texts"]):
        del dataset["documents"]
        dataset["split"] = dataset["split"] or "train"
    path.write_text(json.dumps(value))
    config = recorded_run(store).config
    assert (config.dataset.split, [part.split for part in config.eval.texts]) == (None, [None, "test"])
    assert config == run.config
