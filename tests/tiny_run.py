"""A whole run in miniature: three tiny models of different tokenizer families, a small corpus, one TOML."""

import io
import json
import os
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import pytest

from pipeline.cli.main import main
from tests.tiny_models import save_model
from tests.tiny_tokenizers import TEXTS

REPOSITORY = Path(__file__).parent.parent
NUM_DOCUMENTS = 24
STAGES = ("shard", "logits", "align", "fuse")

CONFIG = """
name = "tiny"

[dataset]
path = "{folder}/corpus.jsonl"

[target]
name = "llama"
path = "{folder}/llama"

[[sources]]
name = "neox"
path = "{folder}/neox"

[shard]
max_length = 64
documents_per_shard = 4
validation_fraction = 0.25

[logits]
max_length = 64
dtype = "float32"
device = "cpu"
num_workers = 1

[align]
preset = "semi-relaxed"
num_workers = 1

[fuse]
max_length = 64
granularity = "segment"
num_workers = 1

[train]
batch_size = 4
micro_batch_size = 2
learning_rate = 1e-3
warmup_ratio = 0.1
autocast = "float32"
checkpoint_every_steps = 1
device = "cpu"

[eval]
max_length = 64
dtype = "float32"

[engine]
num_cpus = 2
"""


def documents() -> list[str]:
    """Documents of a few sentences in several scripts; one is empty, one is long."""
    texts = [
        " ".join(TEXTS[(index + step) % len(TEXTS)] for step in range(1 + index % 4)) for index in range(NUM_DOCUMENTS)
    ]
    texts[5] = ""
    texts[7] = "".join(TEXTS)
    return texts


def save_inputs(folder: Path) -> Path:
    """Write models, corpus and configuration.

    Returns:
        The TOML file.
    """
    save_model(folder / "llama", architecture="llama", tokenizer_family="spm-bpe", seed=1)
    save_model(folder / "neox", architecture="gpt_neox", tokenizer_family="byte-bpe", seed=2)
    save_model(folder / "gemma", architecture="gemma3", tokenizer_family="unigram", seed=3)
    lines = [json.dumps({"text": text}, ensure_ascii=False) for text in documents()]
    (folder / "corpus.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    config = folder / "tiny.toml"
    config.write_text(CONFIG.format(folder=folder))
    return config


def command(*arguments: str) -> list[str]:
    """Return a ptafuse command line in this interpreter."""
    return [sys.executable, "-m", "pipeline", *arguments]


def environment(**extra: str) -> dict[str, str]:
    """Return the environment of a ptafuse process: finds this checkout, and no Ray of anyone else's."""
    inherited = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    path = os.pathsep.join([str(REPOSITORY / "tests" / "faults"), str(REPOSITORY)])
    return {**inherited, "PYTHONPATH": path, "PYTHONDONTWRITEBYTECODE": "", "HF_HUB_OFFLINE": "1", **extra}


def ptafuse(*arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    """Run a ptafuse command to its end, in this process: nothing is imported anew."""
    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
        patch.setattr(sys, "argv", ["ptafuse", *arguments])
        patch.setenv("COLUMNS", "100")
        try:
            main()
            code = 0
        except SystemExit as stop:
            code = int(stop.code or 0)
    return _checked(subprocess.CompletedProcess(arguments, code, out.getvalue(), err.getvalue()), check)


def ptafuse_process(*arguments: str, check: bool = True, **extra: str) -> subprocess.CompletedProcess[str]:
    """Run a ptafuse command to its end, in a process of its own: with a Ray of its own, and faults."""
    done = subprocess.run(
        command(*arguments),
        check=False,
        cwd=REPOSITORY,
        env=environment(**extra),
        capture_output=True,
        text=True,
        timeout=300,
    )
    return _checked(done, check)


def _checked(done: subprocess.CompletedProcess[str], check: bool) -> subprocess.CompletedProcess[str]:
    if check and done.returncode:
        raise AssertionError(f"{' '.join(done.args)} ended with {done.returncode}:\n{done.stdout}\n{done.stderr}")
    return done


def status(run: Path | str) -> dict[str, dict[str, Any]]:
    """``ptafuse status --json``, by step."""
    return {step["step"]: step for step in json.loads(ptafuse("status", str(run), "--json").stdout)["steps"]}


def data_hashes(run: Path) -> dict[str, dict[int, str]]:
    """step folder -> shard -> sha256 of its data, from the manifests of a run directory."""
    found: dict[str, dict[int, str]] = {}
    for path in sorted(run.glob("**/manifests/shard-*.json")):
        manifest = json.loads(path.read_text())
        folder = str(path.parent.parent.relative_to(run))
        found.setdefault(folder, {})[manifest["shard"]] = manifest["data"]["sha256"]
    return found
