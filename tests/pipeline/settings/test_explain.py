"""What is wrong with a configuration is said in the words of its file."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pipeline.settings.load import ConfigError, load_config, parse_config
from pipeline.settings.run import RunConfig
from stages.contract.fingerprint import Settings
from stages.contract.names import check_name
from tests.pipeline.settings.test_load import MINIMAL, write

TOP = MINIMAL.replace("[[sources]]", "[sources]")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (TOP, r"sources: write \[\[sources\]\] with two brackets: it can be repeated"),
        ('sources = ["gpt2"]' + MINIMAL.split("[[sources]]")[0], r"sources\.0: expected a section \[\[sources\]\] with name"),
        ("sources = []" + MINIMAL.split("[[sources]]")[0], r"sources: expected at least 1; found 0: write a section"),
        (MINIMAL.split("[[sources]]")[0], r"sources: is missing; write a section \[\[sources\]\], one or more"),
        (MINIMAL.replace("[target]", "[[target]]"), r"target: write \[target\] with one bracket: it cannot be repeated"),
        (MINIMAL.replace("[target]", "[other]"), r"target: is missing; write a section \[target\]"),
        (MINIMAL + '[eval.texts]\nname = "n"', r"eval\.texts: write \[\[eval\.texts\]\] with two brackets"),
        (MINIMAL + '[eval]\nsuites = "mmlu"', r"eval\.suites: expected a list of texts in quotes; found the text 'mmlu'"),
        (MINIMAL + "[train]\nlora = true", r"train\.lora: expected a section \[train\.lora\]; found true"),
        (MINIMAL + "[train.lora]\ntarget_modules = 3", r"target_modules: expected 'all-linear' or a list of texts.*found 3"),
        (MINIMAL + "[train]\nlearning_rate = inf", r"train\.learning_rate: expected a finite number; found inf"),
        (MINIMAL + "[train]\nlearning_rate = -nan", r"train\.learning_rate: expected a finite number; found nan"),
        (MINIMAL + "[assumptions]\nparameters = {a = inf}", r"assumptions\.parameters\.a: expected a finite number"),
        (MINIMAL + "[baselines]\nensemble_weights = [inf]", r"baselines\.ensemble_weights\.0: expected a (finite )?number"),
        (MINIMAL + '[train]\nlearning_rate = "1e-4 "\nseed = "x"', r"train\.seed: expected a whole number; found the text 'x'"),
        (MINIMAL + "[train]\nbatch_size = 2.5", r"train\.batch_size: expected a whole number; found 2\.5"),
        (MINIMAL + "[train]\nbatch_size = true", r"train\.batch_size: expected a number; found true"),
        (MINIMAL + "[dataset.x]\n", r"dataset\.x: unknown setting; known settings: control_tokens, documents"),
        (MINIMAL + '[train]\ncompile = "maybe"', r"train\.compile: expected true or false; found the text 'maybe'"),
        (MINIMAL + "[train]\nlambda = 1.5", r"train\.lambda: expected a number of at most 1; found 1\.5"),
        (MINIMAL + "[train]\nlambda_ = 1", r"train\.lambda_: unknown setting; did you mean 'lambda'"),
        (MINIMAL + "[train]\nlearning-rate = 1", r"train\.learning-rate: unknown setting; did you mean 'learning_rate'"),
        (MINIMAL + "[evaluation]\n", r"evaluation: unknown setting; did you mean 'eval'"),
        ("lambda = 1" + MINIMAL, r"lambda: unknown setting; it belongs in \[train\]"),
        (MINIMAL + "logits_from = 'x'", r"logits_from: .* it belongs in the top of the file, before the first section"),
        (MINIMAL + "[align]\npreset = 'semi_relaxed'", r"expected one of 'paper', 'semi-relaxed'.*did you mean 'semi-relaxed'"),
        (MINIMAL + "[engine]\nscratch = 3", r"engine\.scratch: expected a path in quotes; found 3"),
        (MINIMAL.replace('path = "corpus.jsonl"', 'path = ["a", "b"]'), r"path: expected a text.*; found a list of 2"),
        (MINIMAL.replace('name = "x"', ""), r"name: is missing; expected a text in quotes \(Names the recorded"),
        (MINIMAL.replace('name = "x"', 'name = "My run!"'), r"name: 'My run!' cannot name a folder: .*, e\.g\. 'My-run'"),
    ],
)  # fmt: skip
def test_a_wrong_setting_is_explained_with_what_to_write(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as raised:
        load_config(write(tmp_path, text))
    assert "Input should" not in str(raised.value)


def _fields(section: type[Settings], keys: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    for name, field in section.model_fields.items():
        own = (*keys, field.alias or name)
        yield own
        inner = [
            part for part in (field.annotation, *getattr(field.annotation, "__args__", ())) if isinstance(part, type)
        ]
        for part in inner:
            if issubclass(part, Settings):
                yield from _fields(part, own)


VALID = {
    "name": "x",
    "dataset": {"path": "corpus.jsonl"},
    "target": {"name": "a", "path": "a"},
    "sources": [{"name": "b", "path": "b"}],
}
WRONG: tuple[Any, ...] = (
    True,
    -1,
    10**6,
    0.5,
    -1e9,
    float("inf"),
    float("nan"),
    "",
    "x y",
    [],
    [1],
    ["x"],
    [{}],
    {},
    {"x": 1},
)


def refused(values: dict[str, Any]) -> str:
    """What is said of a configuration; nothing if it can be used."""
    try:
        parse_config(values, where="x.toml")
    except ConfigError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("keys", list(_fields(RunConfig)), ids=".".join)
def test_every_message_is_ours_not_a_librarys(keys: tuple[str, ...]) -> None:
    """Whatever value a setting has, what is said of it is about the setting and in our words."""
    for wrong in WRONG:
        values: dict[str, Any] = {
            key: dict(value) if isinstance(value, dict) else value for key, value in VALID.items()
        }
        table = values
        for key in keys[:-1]:
            inside = table.setdefault(key, {})
            if isinstance(inside, list):
                table[key] = [dict(inside[0])]
                inside = table[key][0]
            table = inside
        table[keys[-1]] = wrong
        message = refused(values)
        for words in ("Input should", "pydantic", "pattern", "_type", "regex", "[a-z", "Value error", "dictionary"):
            assert words not in message, (keys, wrong)
        assert not message or any(key in message for key in (*keys, "(the file)")), (keys, wrong)


# --- names ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["Qwen-7B", "a", "0", "Llama_3.1-8B-Instruct", "x" * 100])
def test_upper_case_is_allowed_in_names(tmp_path: Path, name: str) -> None:
    config = load_config(write(tmp_path, MINIMAL.replace('name = "a"', f'name = "{name}"')), (f"name='{name}'",))
    assert (config.target.name, config.name) == (name, name)


@pytest.mark.parametrize("name", ["", " ", "a b", "-a", ".a", "a/b", "ä", "x" * 101, "a\n"])
def test_names_that_no_folder_can_have_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match="cannot name a folder"):
        check_name(name)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (MINIMAL.replace('name = "a"', 'name = "B"'), "model names must differ in more than the case.*rename 'B' or 'b'"),
        (MINIMAL.replace('name = "a"', 'name = "Fused"'), "a model cannot be named 'Fused': that is the trained model's name"),
        (MINIMAL.replace('name = "a"', 'name = "ENSEMBLE"'), "a model cannot be named 'ENSEMBLE': that is a baseline's name"),
        (
            MINIMAL + '[[eval.texts]]\nname = "News"\npath = "x"\n[[eval.texts]]\nname = "news"\npath = "y"',
            "names of texts must differ in more than the case of letters",
        ),
        (MINIMAL + '[[eval.texts]]\nname = "HeldOut"\npath = "x"', "a text cannot be named 'HeldOut'"),
    ],
)  # fmt: skip
def test_names_that_are_one_folder_on_some_disks_are_refused(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(write(tmp_path, text))


def test_problems_of_a_file_are_counted() -> None:
    with pytest.raises(
        ConfigError, match=r"x\.toml: 3 wrong setting\(s\)\n  name: .*\n  dataset: .*\n  target: "
    ) as raised:
        parse_config({"sources": VALID["sources"]}, where="x.toml")
    assert str(raised.value).count("\n") == 3
