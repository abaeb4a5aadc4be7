"""Configurations: the shipped ones load, and a wrong one is refused with its place and the remedy."""

import re
from pathlib import Path

import pytest

from pipeline.settings.load import ConfigError, load_config, shipped_configs

MINIMAL = """
name = "x"
[dataset]
path = "corpus.jsonl"
[target]
name = "a"
path = "a"
[[sources]]
name = "b"
path = "b"
"""


DRAWS = "[logits]\ntail_samples = 4\n"


def write(folder: Path, text: str) -> Path:
    path = folder / "x.toml"
    path.write_text(text)
    return path


@pytest.mark.parametrize("path", shipped_configs(), ids=lambda path: path.stem)
def test_shipped_configuration_loads(path: Path) -> None:
    config = load_config(path)
    assert config.sources
    assert load_config(path.stem) == config


def test_the_papers_run_is_complete() -> None:
    config = load_config("llama2_7b")
    assert config.dataset.hub == "JeanKaddour/minipile"
    assert [model.hub for model in config.models] == [
        "meta-llama/Llama-2-7b-hf", "openlm-research/open_llama_7b_v2", "mosaicml/mpt-7b"
    ]  # fmt: skip
    train, align = config.train, config.align
    assert (train.lambda_, train.batch_size, train.learning_rate, train.warmup_ratio) == (0.8, 256, 1e-5, 0.008)
    assert (train.adam_beta1, train.adam_beta2, train.weight_decay, train.clip_norm) == (0.9, 0.95, 0.1, 1.0)
    assert (align.pairing, align.marginals, align.projection) == ("edit-distance", "balanced", "argmax")
    assert (align.epsilon, align.tolerance, config.fuse.max_length) == (1 / 30, 1e-5, 2048)


def test_the_run_on_conversations_is_complete() -> None:
    config = load_config("chat")
    assert (config.dataset.messages_column, config.dataset.train_on) == ("messages", "assistant")
    assert [model.hub for model in config.models] == [
        "meta-llama/Llama-3.1-8B-Instruct", "Qwen/Qwen3-8B", "google/gemma-3-12b-it"
    ]  # fmt: skip
    for pinned in (config.dataset, *config.models):
        assert re.fullmatch(r"[0-9a-f]{40}", str(pinned.revision)), "a commit: what a branch names may change"
    assert all(model.reads_conversations for model in config.models)
    assert config.train.isolate_documents
    assert config.fuse.packing == "whole"
    assert config.eval.num_generations > 0


def test_minimal_configuration_has_defaults(tmp_path: Path) -> None:
    config = load_config(write(tmp_path, MINIMAL))
    assert config.train.lambda_ == 0.8
    assert config.logits.top_k == 10


@pytest.mark.parametrize(
    ("addition", "message"),
    [
        ("[align]\nepsilonn = 0.1", r"align\.epsilonn: unknown setting; did you mean 'epsilon'\?"),
        ("[align]\nepsilon = -1", r"align\.epsilon: expected a number above 0; found -1"),
        ("[align]\nprojection = 'plan'\nmarginals = 'balanced'", "gives back the target's own distribution"),
        ("[align]\npreset = 'papier'", r"align\.preset"),
        ("[align]\ntop_k = 20", "asks for more candidates than logits.top_k = 10 keeps"),
        (
            "[train]\nbatch_size = 3\nmicro_batch_size = 2",
            "train: batch_size = 3 is not a multiple.* set batch_size to 2 or 4",
        ),
        (
            "[train]\nbatch_size = 256\nmicro_batch_size = 2\nnum_workers = 6",
            "set batch_size to 252 or 264, or num_workers to 1, 2, 4, 8",
        ),
        ("[logits]\nbackend = 'llama.cpp'", r"logits\.backend"),
        ("[[sources]]\nname = 'a'\npath = 'c'", "'a' is given twice"),
        ("[[sources]]\nname = 'c'", "give exactly one of `hub`"),
        ("[[sources]]\nname = 'c'\nhub = 'org/x'", "`hub` and `revision` go together"),
        ("[[sources]]\nname = 'C D'\npath = 'c'", r"sources\.1\.name"),
        ("[[sources]]\nname = 'fused'\npath = 'c'", "cannot be named 'fused'"),
        ("[train]\ntail_loss = 'gold'", "train.tail_loss = 'gold' needs align.tail = 'bucket'"),
        ("[train]\ntail_loss = 'gold'\ntemperature = 2.0", "goes with fusion_loss = 'forward-kl' at temperature = 1"),
        ("[fuse]\nfunction = 'fitted'", "fuse.function = 'fitted' needs align.tail = 'bucket'"),
        ("[align]\npreset = 'semi-relaxed'\n[fuse]\nfunction = 'fitted'\nper = 'kind'", "needs dataset.kind_column"),
        ("[logits]\ntail_samples = 4", "tail_samples = 4 needs align.tail = 'bucket', and it is 'renormalise'"),
        ("[logits]\ntail_samples = 4\nbackend = 'vllm'", "set backend = 'transformers', or tail_samples = 0"),
        ("[logits]\ntail_samples = 4\ntop_p = 0.9", "set top_p = 1, or tail_samples = 0"),
        (f"{DRAWS}[align]\ntop_k = 8\ntail = 'bucket'", "needs align.top_k = logits.top_k = 10, and it is 8"),
        (f"{DRAWS}[align]\ntop_p = 0.9\ntail = 'bucket'", "align.top_p = 0.9 cuts entries for which no draws stand"),
        (
            f"{DRAWS}[align]\ntail = 'bucket'\n[fuse]\ntop_k = 9",
            "fuse.top_k of at least logits.top_k = 10, and it is 9",
        ),
        (
            f"{DRAWS}[align]\ntail = 'bucket'\n[train]\ntail_loss = 'gold'",
            "needs train.tail_loss = 'bucket': 'gold' stands for the mass that rows omit",
        ),
        ("[eval]\nsplit = 'test'", 'eval.split = "test" has no documents: set shard.test_fraction'),
        (
            "[eval]\nnum_generations = 5",
            "eval.num_generations = 5 asks for answers to held-out turns, and the dataset holds texts: set dataset.messages",
        ),
        ("[tarin]\nseed = 1", r"tarin: unknown setting; did you mean 'train'\?"),
        ("[zzz]\nseed = 1", "zzz: unknown setting; known settings: align, assumptions, baselines, dataset"),
    ],
)
def test_wrong_configuration_says_where_and_what(tmp_path: Path, addition: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(write(tmp_path, MINIMAL + addition))


def test_draws_go_with_the_preset_that_keeps_the_tail(tmp_path: Path) -> None:
    config = load_config(write(tmp_path, f"{MINIMAL}{DRAWS}[align]\npreset = 'semi-relaxed'"))
    assert config.logits.tail_samples == 4


def test_no_source_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="sources"):
        load_config(write(tmp_path, MINIMAL.split("[[sources]]", maxsplit=1)[0]))


def test_missing_file_names_the_shipped_ones() -> None:
    with pytest.raises(ConfigError, match=r"no such configuration: nothing\.toml.*demo, llama2_7b"):
        load_config("nothing.toml")


def test_missing_file_in_a_folder_is_not_replaced_by_a_shipped_one(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such configuration"):
        load_config(tmp_path / "demo.toml")


def test_broken_toml_says_where(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"is not TOML.*line 1"):
        load_config(write(tmp_path, "name = \nx = 1\n"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name = demo", r"line 1, column 8\): name = demo\. Texts are written in quotes"),
        ('path = "C:\\new\\x.jsonl"', r"put a Windows path in single quotes"),
        ('name = "x"\nname = "y"\n', r'line 2.*: name = "y"\. A setting or a section is given twice'),
        ('[sources]\nname = "a"\n[sources]\nname = "b"', r"are written with two brackets: \[\[sources\]\]"),
    ],
)
def test_broken_toml_is_shown_with_what_to_write(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(write(tmp_path, text))


def test_a_byte_order_mark_is_skipped_and_utf_16_is_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "x.toml"
    path.write_bytes(b"\xef\xbb\xbf" + MINIMAL.encode())
    assert load_config(path).name == "x"
    path.write_bytes(MINIMAL.encode("utf-16"))
    with pytest.raises(ConfigError, match=r"x\.toml is not UTF-8 \(.*save it with the encoding UTF-8"):
        load_config(path)


def test_overrides_are_toml_values(tmp_path: Path) -> None:
    path = write(tmp_path, MINIMAL)
    config = load_config(path, ("align.epsilon=0.2", "align.preset=semi-relaxed", "train.lambda=1.0", "name=y"))
    assert (config.align.epsilon, config.align.marginals, config.train.lambda_, config.name) == (
        0.2,
        "source",
        1.0,
        "y",
    )
    with pytest.raises(ConfigError, match="expected KEY=VALUE"):
        load_config(path, ("align.epsilon",))


def test_an_override_finds_a_table_of_a_list_by_its_name(tmp_path: Path) -> None:
    other = '\n[[sources]]\nname = "qwen-0.5b"\nhub = "a/b"\nrevision = "main"\n'
    path = write(tmp_path, MINIMAL + other)
    config = load_config(path, ("sources.qwen-0.5b.revision=abc", "sources.qwen-0.5b.adapt.num_epochs=3"))
    found = {source.name: source for source in config.sources}
    assert (found["qwen-0.5b"].revision, found["qwen-0.5b"].adapt.num_epochs) == ("abc", 3)
    assert all(source.revision != "abc" for name, source in found.items() if name != "qwen-0.5b")
    with pytest.raises(ConfigError, match=r"qwen\.revision begins with no name .* the names are .*qwen-0\.5b"):
        load_config(path, ("sources.qwen.revision=abc",))
