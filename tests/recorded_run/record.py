"""Record the run that ``test_recorded_run.py`` takes up: ``python -m tests.recorded_run.record``.

Record it again only when an algorithm's VERSION was raised, and commit the archive with that change: until then the
archive proves that runs which were computed by an earlier ptafuse stay valid.
"""

import json
import shutil
import tarfile
from pathlib import Path

from tests.tiny_models import save_model
from tests.tiny_run import CONFIG, documents, ptafuse

ARCHIVE = Path(__file__).parent / "run.tar.xz"
FOLDER = Path("/tmp/recorded-run")  # recorded configurations hold absolute paths: the same for everybody
NUM_DOCUMENTS = 12
SMALL = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}


def save_inputs(folder: Path) -> Path:
    """Write two models, a corpus and a configuration, and return the TOML file."""
    save_model(
        folder / "llama",
        architecture="llama",
        tokenizer_family="spm-bpe",
        seed=1,
        settings={**SMALL, "num_key_value_heads": 2},
    )
    save_model(folder / "neox", architecture="gpt_neox", tokenizer_family="byte-bpe", seed=2, settings=SMALL)
    lines = [json.dumps({"text": text}, ensure_ascii=False) for text in documents()[:NUM_DOCUMENTS]]
    (folder / "corpus.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    config = folder / "tiny.toml"
    config.write_text(CONFIG.format(folder=folder))
    return config


def main() -> None:
    """Compute the run and pack it, without its checkpoints."""
    shutil.rmtree(FOLDER, ignore_errors=True)
    FOLDER.mkdir()
    run = FOLDER / "run"
    ptafuse("eval", str(save_inputs(FOLDER)), "--run", str(run), "--local", "--upstream")
    for checkpoint in run.glob("train/*/checkpoint-*"):
        shutil.rmtree(checkpoint)
    with tarfile.open(ARCHIVE, "w:xz") as archive:
        archive.add(FOLDER, arcname="recorded-run")


if __name__ == "__main__":
    main()
