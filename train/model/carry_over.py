"""Files other than weights that an exported model keeps of the model that was trained.

How to sample (generation_config.json), a processor, a chat template, code and licence are files of the target's folder that
transformers' ``save_pretrained`` rewrites from the model or leaves out.
"""

import fnmatch
import json
import logging
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from stages.models.config import TOKENIZER_FILES, ModelConfig, PretrainedFiles
from stages.models.tokenizer import SegmentTokenizer
from train.model.card import CARD

logger = logging.getLogger(__name__)

_WEIGHTS: Final = (
    "*.safetensors",
    "*.safetensors.index.json",
    "*.bin",
    "*.bin.index.json",
    "*.pt",
    "*.pth",
    "*.ckpt",
    "*.gguf",
    "*.ggml",
    "*.h5",
    "*.msgpack",
    "*.onnx",
    "*.onnx_data",
    "*.npz",
    "*.tflite",
    "params.json",  # of the same weights in another library's form (consolidated.*)
)
_OWN: Final = ("config.json", CARD, "adapter_config.json", "hf_quant_config.json")
"""Files of the top folder that the export writes itself, or that describe weights which it does not have."""
_LEFT_OUT_FOLDERS: Final = ("checkpoint-*", ".*", "__pycache__")
_OF_TOKENIZER: Final = (*TOKENIZER_FILES, "chat_template*")


def carry_over(model: ModelConfig, folder: Path) -> None:
    """Copy what is not weights from a model's files, over files of the same name.

    Args:
        model: model that was trained.
        folder: folder of the exported model; its config.json and model card stay.
    """
    original = _folder_of(model)
    if original is not None:
        keeps_tokenizer = model.tokenizer is None
        for file in _other_files(original):
            if keeps_tokenizer or not _matches(file.name, _OF_TOKENIZER):
                _copy(file, folder / file.relative_to(original))
    if model.tokenizer is not None and (elsewhere := _folder_of(model.tokenizer)) is not None:
        for file in elsewhere.iterdir():
            if file.is_file() and _matches(file.name, _OF_TOKENIZER):
                _copy(file, folder / file.name)


def keep_conversations(model: ModelConfig, folder: Path) -> None:
    """Make an exported model answer as it was trained on conversations.

    If the run gave it a chat template, the template becomes the tokenizer's own. The token that ended the turns it was trained
    on is added to the tokens that end generation.

    Args:
        model: the trained model.
        folder: folder of the exported model, with the tokenizer and generation_config.json.
    """
    if not model.reads_conversations:
        return
    tokenizer = SegmentTokenizer.load(model)
    if tokenizer.chat_template is not None:
        (folder / "chat_template.jinja").write_text(tokenizer.chat_template, encoding="utf-8")
    file, turn_end = folder / "generation_config.json", tokenizer.vocabulary.eos_id
    settings = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    known = settings.get("eos_token_id")
    ends = [] if known is None else known if isinstance(known, list) else [known]
    if turn_end not in ends:
        file.write_text(json.dumps({**settings, "eos_token_id": [*ends, turn_end]}, indent=2) + "\n", encoding="utf-8")


def _folder_of(files: PretrainedFiles) -> Path | None:
    """Return the folder of local files, or of the hub's files except weights; None for a GGUF file, which is complete."""
    if files.is_gguf:
        return None
    if files.path is not None:
        return files.path
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(str(files.hub), revision=files.revision, ignore_patterns=list(_WEIGHTS)))
    except OSError as error:  # no network, and nothing in the cache
        logger.warning(
            "the export lacks files that %s has in addition to weights and tokenizer (%s): copy them there yourself",
            files.hub,
            str(error).splitlines()[0],
        )
        return None


def _other_files(folder: Path) -> Iterator[Path]:
    for file in sorted(folder.rglob("*")):
        parents = file.relative_to(folder).parts[:-1]
        is_left_out = any(_matches(parent, _LEFT_OUT_FOLDERS) for parent in parents) or file.name.startswith(".")
        is_own = not parents and file.name in _OWN
        if file.is_file() and not (is_left_out or is_own or _matches(file.name, _WEIGHTS)):
            yield file


def _matches(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatch.fnmatch(name, pattern) for pattern in patterns)


def _copy(file: Path, to: Path) -> None:
    to.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(file, to)
