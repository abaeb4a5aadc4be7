"""Configuration of a model: where its weights and its tokenizer come from, and what identifies them."""

import hashlib
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Final, Literal, Self

from pydantic import AfterValidator, Field, model_validator

from stages.contract.digest import cached_file_sha256
from stages.contract.fingerprint import ADDED, RUNTIME, Settings
from stages.contract.names import Name
from stages.models.quantization import quantization_method, unpacking

log = logging.getLogger(__name__)

TOKENIZER_FILES = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab*",
    "merges.txt",
    "*.model",
    "*.tiktoken",
)
TEMPLATE_FILES = ("chat_template*", "additional_chat_templates/*", "tokenizer_config.json")
"""Files that may hold a tokenizer's own chat template."""
PLAIN: Final = "plain"
"""Value of ``chat_template`` for the generic template."""
PLAIN_TEMPLATE_VERSION: Final = 1
"""Raised when the generic template changes."""
WEIGHT_FILES = ("config.json", "*.safetensors", "*.safetensors.index.json")


def check_place(*, hub: str | None, revision: str | None, path: object) -> None:
    """Refuse files that are said to be in two places or in none.

    Raises:
        ValueError: says which settings go together.
    """
    if (hub is None) == (path is None):
        raise ValueError("give exactly one of `hub` (with `revision`) and `path`")
    if (hub is None) != (revision is None):
        raise ValueError("`hub` and `revision` go together: pin the commit to use")


def absolute_path(path: Path | None) -> Path | None:
    """Make a path absolute: a relative one refers to this process's folder, and a worker may run in another one."""
    return None if path is None else path.expanduser().absolute()


def absolute_template(template: str | None) -> str | None:
    """Return the absolute path of a template's file, as ``absolute_path`` does; ``"plain"`` stays."""
    return template if template in (None, PLAIN) else str(absolute_path(Path(template)))


class PretrainedFiles(Settings):
    """Location of a model's files: a hub id with its revision, a local folder, or a GGUF file."""

    hub: str | None = Field(None, description="Hugging Face hub id, e.g. 'meta-llama/Llama-2-7b-hf'.")
    revision: str | None = Field(
        None, description="Commit, tag or branch on the hub; required with `hub`, preferably a commit."
    )
    path: Annotated[Path | None, AfterValidator(absolute_path), RUNTIME] = Field(
        None, description="A local folder, or a .gguf file."
    )

    @model_validator(mode="after")
    def _one_place(self) -> Self:
        check_place(hub=self.hub, revision=self.revision, path=self.path)
        return self

    @property
    def is_gguf(self) -> bool:
        """Whether the files are one GGUF file."""
        return self.path is not None and self.path.suffix == ".gguf"

    def pretrained_arguments(self) -> dict[str, Any]:
        """Return the arguments of transformers' ``from_pretrained``."""
        if self.path is None:
            return {"pretrained_model_name_or_path": self.hub, "revision": self.revision}
        # Without `local_files_only` transformers would ask the hub for a folder that it does not find.
        if self.is_gguf:
            folder, name = str(self.path.parent), self.path.name
            return {"pretrained_model_name_or_path": folder, "gguf_file": name, "local_files_only": True}
        return {"pretrained_model_name_or_path": str(self.path), "local_files_only": True}

    def identity(self, patterns: tuple[str, ...]) -> str:
        """Identify the files: by hub id and revision, or by the hash of the local files that match ``patterns``."""
        if self.path is None:
            return f"{self.hub}@{self.revision}"
        files = (
            [self.path] if self.is_gguf else sorted({file for pattern in patterns for file in self.path.glob(pattern)})
        )
        digest = hashlib.sha256()
        for file in files:
            digest.update(f"{file.name}:{cached_file_sha256(file)}\n".encode())
        return f"sha256:{digest.hexdigest()}"

    def check(self) -> None:
        """Refuse a local path that is missing, or a single file of a folder.

        Raises:
            FileNotFoundError: says which path, and what a path may be.
        """
        if self.path is not None and not self.path.exists():
            raise FileNotFoundError(
                f"no such model or tokenizer: {self.path} (expected a folder with config.json and *.safetensors, or a .gguf "
                "file). The demo's models are fetched by `make demo-data`; for a model of the Hugging Face hub give "
                "`hub` and `revision` instead of `path`."
            )
        if self.path is not None and self.path.is_file() and not self.is_gguf:
            raise FileNotFoundError(
                f"{self.path} is a file (expected a folder with config.json, tokenizer and *.safetensors, or a .gguf file): "
                f"give its folder, {self.path.parent}"
            )

    def require(self, kind: str, patterns: tuple[str, ...]) -> None:
        """Refuse a local folder without any file of some kinds.

        Raises:
            FileNotFoundError: says what was expected and what is there.
        """
        if self.path is None or not self.path.is_dir():
            return
        if not any(next(self.path.glob(pattern), None) for pattern in patterns):
            names = ", ".join(sorted(file.name for file in self.path.iterdir())[:8]) or "nothing"
            raise FileNotFoundError(
                f"{self.path} holds no {kind} (expected {' or '.join(patterns)}); it holds: {names}"
            )


class ModelConfig(PretrainedFiles):
    """Model of the run: the target, or a source."""

    name: Annotated[Name, RUNTIME] = Field(
        description="Name of its folder in the run directory: letters, digits, . _ -"
    )
    tokenizer: PretrainedFiles | None = Field(
        None, description="Location of the tokenizer, if it is not with the weights."
    )
    bos: bool | None = Field(
        None, description="Prepend BOS to each segment? By default as the tokenizer does with plain text."
    )
    control_tokens: Annotated[Literal["split", "parse"], ADDED] = Field(
        "split",
        description="How to treat the text of its control tokens in documents; by default as in `[dataset]`.",
    )
    reads_conversations: Annotated[bool, ADDED] = Field(
        False, description="Documents are conversations; set by `[dataset] messages_column`, not by hand."
    )
    chat_template: Annotated[str | None, AfterValidator(absolute_template), RUNTIME] = Field(
        None,
        description="Chat template for conversations: a Jinja file, or 'plain', a generic template for models that "
        "have none. By default the tokenizer's own template.",
    )
    trust_remote_code: bool = Field(
        False, description="Run Python code that comes with this model. Off unless you trust it."
    )

    @property
    def tokenizer_files(self) -> PretrainedFiles:
        """Location of the tokenizer's files."""
        return self.tokenizer or PretrainedFiles(hub=self.hub, revision=self.revision, path=self.path)

    def weights_identity(self) -> str:
        """Identify the weights."""
        return self.identity(WEIGHT_FILES)

    def tokenizer_identity(self) -> str:
        """Identify the tokenizer and how the run uses it: its files, BOS, control tokens, and the chat template."""
        parsed = ";control_tokens=parse" if self.control_tokens == "parse" else ""
        template = f";chat_template={self._template_identity()}" if self.reads_conversations else ""
        return f"{self.tokenizer_files.identity(TOKENIZER_FILES)};bos={self.bos}{parsed}{template}"

    def _template_identity(self) -> str:
        """Identify the chat template: the generic one, a file, or the one in the tokenizer's files."""
        if self.chat_template is None:
            return self.tokenizer_files.identity(TEMPLATE_FILES)
        if self.chat_template == PLAIN:
            return f"{PLAIN}:{PLAIN_TEMPLATE_VERSION}"
        return f"sha256:{cached_file_sha256(Path(self.chat_template))}"

    def check(self) -> None:
        """Refuse a missing local path, of the weights or of the tokenizer, and a folder without them."""
        super().check()
        self.require("model configuration", ("config.json",))
        self.check_weights()
        self.tokenizer_files.check()
        self.tokenizer_files.require("tokenizer", TOKENIZER_FILES)
        if self.chat_template not in (None, PLAIN) and not Path(str(self.chat_template)).is_file():
            raise FileNotFoundError(
                f"chat_template = {self.chat_template!r} is not a file (expected a Jinja file, or 'plain'): correct the path"
            )

    def check_weights(self) -> None:
        """Refuse a folder without weights.

        Raises:
            FileNotFoundError: lists the existing files; if there are only pickled weights, says how to convert them.
        """
        if self.path is not None and self.path.is_dir() and not any(self.path.glob("*.safetensors")):
            pickled = sorted(file.name for file in self.path.glob("*.bin"))
            if pickled:
                more = f" and {len(pickled) - 1} more" if len(pickled) > 1 else ""
                raise FileNotFoundError(
                    f"{self.path} holds only pickled weights ({pickled[0]}{more}), which can run arbitrary code and "
                    f"are not loaded (expected *.safetensors): `ptafuse convert {self.path}` converts them to "
                    "safetensors without running any of their code"
                )
        self.require("weights", ("*.safetensors",))


def load_tokenizer(model: ModelConfig) -> Any:
    """Load the model's transformers tokenizer, with its fast (Rust) backend.

    A tokenizer that draws at random how it splits a word (BPE dropout, Unigram sampling) is made to always split it in the
    most likely way: a text has to have the same tokens in every stage.

    Raises:
        ValueError: it cannot be loaded, or has no fast backend, so that byte offsets of its tokens cannot be computed.
    """
    from transformers import AutoTokenizer

    arguments = model.tokenizer_files.pretrained_arguments()
    try:
        tokenizer = AutoTokenizer.from_pretrained(**arguments, trust_remote_code=model.trust_remote_code)
    except (
        Exception
    ) as error:  # transformers lets any error of its readers through, and tokenizers raises Exception itself
        raise ValueError(f"model {model.name}: its tokenizer cannot be loaded: {error}") from error
    _switch_off_sampling(model, tokenizer)
    if not tokenizer.is_fast:
        raise ValueError(
            f"model {model.name}: {type(tokenizer).__name__} has no fast backend, so the byte offsets of its tokens "
            "cannot be computed; give `tokenizer` a folder or hub id that holds a tokenizer.json"
        )
    return tokenizer


def embedding_rows(model: ModelConfig) -> int | None:
    """Return how many tokens a model has embeddings of, as its config.json says; None where that is not available.

    Nothing is fetched: of a model of the hub, the local cache is asked.
    """
    if model.path is not None:
        file: str | Path | object = model.path / "config.json"
    else:
        from huggingface_hub import try_to_load_from_cache

        file = try_to_load_from_cache(str(model.hub), "config.json", revision=model.revision)
    if not isinstance(file, str | Path):
        return None
    try:
        settings = json.loads(Path(file).read_text(encoding="utf-8"))
        size = (settings.get("text_config") or settings).get("vocab_size")
    except (OSError, ValueError, AttributeError):  # no such file, or another kind of file
        return None
    return size if isinstance(size, int) else None


def _switch_off_sampling(model: ModelConfig, tokenizer: Any) -> None:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    pieces = getattr(backend, "model", None)
    for name in ("dropout", "alpha", "nbest_size"):
        value = getattr(pieces, name, None)
        if value is None:
            continue
        if value:
            log.warning(
                "model %s: its tokenizer splits words at random (%s = %s in tokenizer.json); this is disabled",
                model.name,
                name,
                value,
            )
        setattr(pieces, name, None)


def load_model(model: ModelConfig, *, dtype: str, attention: tuple[str, ...], device: str) -> Any:
    """Load the model's weights as a transformers causal language model, in eval mode on ``device``.

    Args:
        model: which model.
        dtype: ``"float32"``, ``"bfloat16"`` or ``"float16"``.
        attention: implementations in order of preference (``devices.attention_choices``); the first that this
            architecture supports is taken.
        device: a torch device.
    """
    return _first_supported(
        model, attention, lambda choice: _load_model(model, dtype=dtype, attention=choice, device=device)
    )


def empty_model(model: ModelConfig, *, attention: tuple[str, ...]) -> Any:
    """Build the model on the meta device, as float32: its parameters have shapes but no values, and take no memory.

    Args:
        model: which model.
        attention: attention implementation, as for ``load_model``.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    trust = model.trust_remote_code
    config = AutoConfig.from_pretrained(**model.pretrained_arguments(), trust_remote_code=trust)
    if hasattr(config, "quantization_config"):
        del config.quantization_config  # a model that is built has plain weights, and an export of it says so

    def build(choice: str) -> Any:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(
                config, dtype=torch.float32, attn_implementation=choice, trust_remote_code=trust
            )

    return _first_supported(model, attention, build)


def _first_supported(model: ModelConfig, attention: tuple[str, ...], make: Callable[[str], Any]) -> Any:
    """Return what ``make`` returns for the first attention implementation that the architecture supports."""
    for choice in attention[:-1]:
        try:
            return make(choice)
        except ValueError as error:
            if "does not support" not in str(error):
                raise
            log.info("model %s: no %s attention for this architecture, trying the next", model.name, choice)
    return make(attention[-1])


def load_config(model: ModelConfig) -> Any:
    """Load the model's transformers configuration, without its weights."""
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(**model.pretrained_arguments(), trust_remote_code=model.trust_remote_code)


def num_positions(loaded: Any, wanted: int) -> int:
    """Return ``wanted``, or the model's own number of positions if that is smaller.

    Args:
        loaded: a transformers model, or its configuration.
        wanted: configured value.
    """
    config = getattr(loaded, "config", loaded)
    limit = getattr(config.get_text_config(), "max_position_embeddings", None)
    return wanted if limit is None else min(wanted, int(limit))


def _load_model(model: ModelConfig, *, dtype: str, attention: str, device: str) -> Any:
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()  # ours shows shards; theirs flashes once per worker
    loaded, report = AutoModelForCausalLM.from_pretrained(
        **model.pretrained_arguments(),
        **(_unpacked_gguf() if model.is_gguf else {"use_safetensors": True}),  # a pickle could run anything
        **_unpacked_weights(model, device),
        dtype=getattr(torch, dtype),
        attn_implementation=attention,
        trust_remote_code=model.trust_remote_code,
        output_loading_info=True,
    )
    if report["missing_keys"]:  # the preflight says so earlier, where it could see the files
        names = sorted(report["missing_keys"])
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        raise ValueError(
            f"model {model.name}: the weights lack {', '.join(names[:3])}{more}, which transformers initialised at "
            f"random; expected every tensor of {type(loaded).__name__}. Fetch the weights again, or correct "
            "config.json; see `ptafuse check`"
        )
    return loaded.to(device).eval()


def _unpacked_weights(model: ModelConfig, device: str) -> dict[str, Any]:
    """Return transformers' arguments to unpack quantised weights, for a model on a CPU or in training."""
    if model.is_gguf or device != "cpu":
        return {}
    method = quantization_method(load_config(model).to_dict())
    unpacking_config = unpacking(method)
    return {} if unpacking_config is None else {"quantization_config": unpacking_config}


def _unpacked_gguf() -> dict[str, Any]:
    """Return the arguments that make transformers unpack GGUF weights; older versions always do."""
    import transformers

    config = getattr(transformers, "GgufConfig", None)
    return {} if config is None else {"quantization_config": config(dequantize=True)}
