"""Check that a model's tokenizer loads, agrees with its tokenizer.json, and that the model has rows for its tokens."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from stages.models.config import ModelConfig
from stages.models.preflight.architecture import first_line
from stages.models.preflight.problem import Problem
from stages.models.tokenizer import SegmentTokenizer
from stages.models.weights import WeightFileError, refuse_stand_in

TOKENIZER_FILE: Final = "tokenizer.json"

PROBES: Final = (
    "In 1999, 12345 tokens cost $3.14159; by 2026 it was 10% less.",
    "  Two  spaces,\ta tab\n\n\nand lines.  ",
    "Don't say WE'LL naïvely: Zoë’s café, façade, Straße, ÅNGSTRÖM, e\u0301.",
    "東京は2026年。我们在河边散步，看见一只小狗。",
    "def f(x):\n    return x ** 2  # {'a': [1, 2]} != None\n",
    "Съешь ещё этих мягких булок, 😀👍🏽",
)
"""Texts on which tokenizers of different kinds differ: digits, white space, accents, contractions, scripts, code."""


def tokenizer_problems(model: ModelConfig, folder: Path | None, *, num_rows: int | None) -> Iterator[Problem]:
    """Examine a model's tokenizer.

    Args:
        model: model that the files belong to; its tokenizer is loaded once for this process (``SegmentTokenizer.load``).
        folder: folder of its files; None for a tokenizer in a GGUF file.
        num_rows: number of rows of the model's embedding; None: unknown.
    """
    place = str(model.tokenizer_files.path or folder)
    file = None if folder is None else folder / TOKENIZER_FILE
    for name in (TOKENIZER_FILE, "tokenizer_config.json", "special_tokens_map.json", "tokenizer.model"):
        if folder is None or not _is_there(folder / name):
            continue
        try:
            refuse_stand_in(folder / name)
            if name.endswith(".json"):
                json.loads((folder / name).read_text(encoding="utf-8"))
        except WeightFileError as error:
            yield Problem(model.name, str(error.file), error.found, error.expected, f"{error.remedy}")
            return
        except ValueError as error:
            yield Problem(
                model.name, str(folder / name), f"not JSON: {first_line(error)}", "JSON", "Fetch the file again"
            )
            return
    try:
        tokenizer = SegmentTokenizer.load(model)
    except ValueError as error:
        yield Problem(model.name, place, str(error).removeprefix(f"model {model.name}: "))
        return
    if file is not None and file.exists():
        yield from _differences(model, file, tokenizer)
    yield from _tokens_without_rows(model, place, tokenizer, num_rows)


def _is_there(file: Path) -> bool:
    return file.exists() or file.is_symlink()


def _differences(model: ModelConfig, file: Path, tokenizer: SegmentTokenizer) -> Iterator[Problem]:
    """Compare the ids of the probes with those of tokenizer.json itself."""
    from tokenizers import Tokenizer

    reference = Tokenizer.from_file(str(file))
    _let_alone(reference)
    for text in PROBES:
        expected = reference.encode(text, add_special_tokens=False).ids
        actual = tokenizer.text_ids(text)
        if actual == expected:
            continue
        first = next(
            (index for index, pair in enumerate(zip(actual, expected, strict=False)) if pair[0] != pair[1]),
            min(len(actual), len(expected)),
        )
        yield Problem(
            model.name,
            str(file),
            f"transformers loads a different tokenizer from this folder than tokenizer.json describes: in {text!r}, "
            f"token {first} is {_shown(actual, first)}, and tokenizer.json gives {_shown(expected, first)}",
            "the same tokens",
            "Use `model_type` in config.json and tokenizer.json from the same model; or copy the tokenizer's files "
            'into a separate folder, set "tokenizer_class": "PreTrainedTokenizerFast" in its tokenizer_config.json, and '
            f"give that folder as `tokenizer = {{path = ...}}` of {model.name}",
        )
        return


def _let_alone(backend: Any) -> None:
    """Take off what a segment's tokens go without: truncation, padding, special tokens."""
    backend.no_truncation()
    backend.no_padding()
    backend.encode_special_tokens = True
    for name in ("dropout", "alpha", "nbest_size"):
        if getattr(backend.model, name, None) is not None:
            setattr(backend.model, name, None)


def _shown(ids: list[int], index: int) -> str:
    return str(ids[index]) if index < len(ids) else "nothing"


def _tokens_without_rows(
    model: ModelConfig, place: str, tokenizer: SegmentTokenizer, num_rows: int | None
) -> Iterator[Problem]:
    """Refuse a model without rows for the tokens that stand before or behind every text.

    Others may be without a row as long as no text holds one: the logits stage sets such texts apart.
    """
    if num_rows is None:
        return
    for role, token_id in (("begins", tokenizer.prefix_id), ("ends", tokenizer.vocabulary.eos_id)):
        if token_id is not None and token_id >= num_rows:
            yield Problem(
                model.name,
                place,
                f"the tokenizer {role} documents with token {token_id}, and the model's embedding has {num_rows} rows",
                "a row for each token that is added to every text",
                "Use tokenizer and weights from the same model, or enlarge the embedding (resize_token_embeddings)",
            )
            return
