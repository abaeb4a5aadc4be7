"""``ptafuse init``: a commented configuration to fill in."""

import re
from pathlib import Path
from typing import Final

from pipeline.settings.load import FILL_IN, ConfigError

TEMPLATE: Final = """\
# A run of ptafuse: a target model learns from the text and from source models. What reads "{fill_in}" must be filled in; all
# else may stay. Lines that begin with "# " and a setting are further settings, with an example. Every setting with its default:
# `ptafuse config {file}`, once it is filled in.
name = "{name}"  # letters, digits, . _ -

[dataset]
# A file, a folder or a glob, or a URL: .parquet, .jsonl (.jsonl.zst, .jsonl.gz), .txt.
path = "{fill_in}"
text_column = "text"  # the column that holds a document's text; .txt files have none
# split = "train"  # of a folder with train-*, validation-* and test-* files: those of one split
# documents = "lines"  # for .txt files: each line is a document, instead of each file
# kind_column = "source"  # column with the kind of each document, for `ptafuse interpret`
# max_documents = 1000  # for a first trial: only this many documents
# Instead of `path`, a data set of the Hugging Face hub:
# hub = "JeanKaddour/minipile"
# revision = "main"  # better a commit: a branch may move between two commands

[target]  # the model that is trained
name = "target"  # names its folders and its rows in tables
# A folder with config.json, *.safetensors and the tokenizer, or a .gguf file.
path = "{fill_in}"
# Instead of `path`, a model of the hub:
# hub = "HuggingFaceTB/SmolLM2-135M-Instruct"
# revision = "main"  # better a commit

[[sources]]  # a model to learn from; repeat [[sources]] for each further one
name = "source"
path = "{fill_in}"  # or `hub` and `revision`, as above

[shard]
max_length = 1024  # maximum number of tokens of a segment, under every tokenizer
documents_per_shard = 1000  # size of a unit of work; it should take less than ten minutes
validation_fraction = 0.05  # share of documents to hold out: without any, nothing can be evaluated

[logits]
max_length = 1024  # maximum number of tokens that a model sees at once
# top_k = 32  # entries kept at each position; 10 by default
# batch_tokens = 1024  # tokens per batch: fewer need less memory
# dtype = "float32"  # bfloat16 by default

[align]
preset = "semi-relaxed"  # or "paper"

[fuse]
function = "fitted"  # mix the models' distributions with weights fitted on the training text; or "min-ce", "avg-ce"
max_length = 1024  # tokens per training block

[train]
lambda = 0.5  # weight of the text itself; the fused distributions have the rest
num_epochs = 1
batch_size = 32  # blocks per step
learning_rate = 1e-5
# lora = {{ r = 16, alpha = 32 }}  # train only low-rank adapters: less memory
# gradient_checkpointing = true  # less memory, a quarter slower

[eval]
max_length = 1024
# suites = ["lambada"]  # benchmarks in addition to bits per byte: needs ptafuse[eval]
"""


def write_template(path: Path) -> list[str]:
    """Write a configuration to fill in.

    Args:
        path: the file; its name gives the run's.

    Returns:
        The settings that must be filled in, each with its line: ``dataset.path (line 9)``.

    Raises:
        ConfigError: there is such a file already, or no folder to write it to.
    """
    stem = re.sub(r"[^A-Za-z0-9._-]+", "-", path.stem).strip("-._") or "my-run"
    text = TEMPLATE.format(fill_in=FILL_IN, file=path, name=stem[:100])
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError:
        raise ConfigError(f"{path} already exists and is not overwritten: give another name, or remove it") from None
    except OSError as error:
        raise ConfigError(
            f"{path} cannot be written ({error.strerror}): give a file in an existing folder that this user can write "
            "to"
        ) from None
    table, places = "", []
    for number, line in enumerate(text.splitlines(), start=1):
        if line.startswith("["):
            table = line.split("]")[0].strip("[")
        elif line.partition(" = ")[2].startswith(f'"{FILL_IN}"'):
            places.append(f"{table}.{line.partition(' = ')[0]} (line {number})")
    return places
