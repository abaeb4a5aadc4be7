"""Token tables: what a tokenizer's ids stand for, written once into the run directory.

Loading a tokenizer takes seconds: a large vocabulary is parsed several times, and the bytes of every token are worked out. A
stage that splits no text needs only the result, so it is kept as Parquet under ``tokenizers/<model>/<fingerprint>/``:

    tokens.parquet                     id, bytes, text, special, marked, role: for stages, and for people who join ids to texts
    to-<fingerprint>/<map>.parquet     id, value: a map from this vocabulary into another, or back

The fingerprint names everything that the content depends on: the tokenizer's files, how the run uses it, the libraries that
read it. Each file repeats it and holds the sha256 of its own content. A file that is damaged, or was made of something else
(copied from elsewhere), is made again, and a message says so. No result depends on these files: they may be removed at any
time.
"""

import hashlib
import io
import json
import logging
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import metadata
from typing import Any, Final, Self, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from stages.contract.digest import sha256
from stages.contract.filesystem import StoreError
from stages.contract.fingerprint import FINGERPRINT_LENGTH, canonical_json
from stages.contract.store import Store
from stages.models.config import ModelConfig, embedding_rows
from stages.models.tokenizer import SegmentTokenizer
from stages.models.vocabulary import Vocabulary

log = logging.getLogger(__name__)

Content = TypeVar("Content")

FOLDER: Final = "tokenizers"
TABLE_FILE: Final = "tokens.parquet"
TABLE_VERSION: Final = 1
"""Of the table's format and of how ``vocabulary.py`` reads it; raised when the same tokenizer gives another table."""
MAX_LOADED: Final = 8
"""Tables that a process remembers."""

_METADATA: Final = b"ptafuse"
_LIBRARIES: Final = ("tokenizers", "transformers")
_NOT_OF_TOKENIZER: Final = frozenset({"name", "hub", "revision", "path", "tokenizer", "chat_template"})
"""Settings of a model that say where files are; what is in them is in ``tokenizer_identity``."""
_OF_TABLE: Final = re.compile(rf"{FOLDER}/[^/]+/[0-9a-f]{{{FINGERPRINT_LENGTH}}}/tokens\.parquet")
_OF_MAP: Final = re.compile(
    rf"{FOLDER}/[^/]+/[0-9a-f]{{{FINGERPRINT_LENGTH}}}/to-[0-9a-f]{{{FINGERPRINT_LENGTH}}}/[a-z_-]+\.parquet"
)
SCHEMA: Final = pa.schema(
    [
        pa.field("id", pa.int32(), nullable=False),
        pa.field("bytes", pa.binary(), nullable=False),  # a word boundary is one leading space
        pa.field("text", pa.string()),  # null where the bytes are no UTF-8: a part of a character
        pa.field("special", pa.bool_(), nullable=False),  # or no token has this id, or the model no row for it
        pa.field("marked", pa.bool_(), nullable=False),  # begins with a space that the pairing distance ignores
        pa.field("role", pa.string()),  # "bos" | "eos", null for all others
    ]
)
"""A token table: one row per id."""
_MAP_SCHEMA: Final = pa.schema(
    [pa.field("id", pa.int32(), nullable=False), pa.field("value", pa.int32(), nullable=False)]
)

_LOADED: Final[dict[tuple[str, str], "TokenTable"]] = {}

Keep = Callable[[str, Callable[[], np.ndarray]], np.ndarray]
"""Name of a map, and what computes it -> the map: (V,) int32."""


def compute_only(name: str, compute: Callable[[], np.ndarray]) -> np.ndarray:
    """Return what is computed: a ``Keep`` that keeps nothing."""
    del name
    return compute()


class DamagedTableError(ValueError):
    """A file of the folder ``tokenizers`` is not what it should be."""


@dataclass(frozen=True, eq=False)
class TokenTable:
    """Part of a model's tokenizer that stages need unless they split texts into tokens.

    Attributes:
        vocabulary: what its ids stand for.
        prefix_id: the token that stands before every text; None without.
        has_dummy_prefix: it writes a text's first token with a space that the text does not have.
        spells_text: its tokens, end to end, are the text's bytes; False where it normalises (lower case, NFKC).
        texts: (V,) each token's text, decoded; bytes that are no UTF-8 become lone surrogates.
    """

    vocabulary: Vocabulary
    prefix_id: int | None
    has_dummy_prefix: bool
    spells_text: bool
    texts: tuple[str, ...]

    @classmethod
    def of(cls, tokenizer: SegmentTokenizer) -> Self:
        """Return the table of a loaded tokenizer."""
        vocabulary = tokenizer.vocabulary
        texts = tuple(map(vocabulary.text, range(vocabulary.size)))
        return cls(vocabulary, tokenizer.prefix_id, tokenizer.has_dummy_prefix, tokenizer.spells_text, texts)


class TokenTables:
    """The token tables of a run directory: read there; made of the tokenizer, and written, where they are missing.

    Args:
        store: the run directory; None: tables are made of the tokenizers, and not kept.
        may_write: write what is missing. False for a command that only reads.
    """

    def __init__(self, store: Store | None = None, *, may_write: bool = True) -> None:
        self._store = store
        self._may_write = may_write

    def read(self, model: ModelConfig) -> TokenTable:
        """Return a model's table; the last few are remembered.

        Raises:
            ValueError: there is no table, and the tokenizer cannot be used; names the model.
        """
        settings = table_settings(model)
        folder = _folder(model, settings)
        place = ("" if self._store is None else self._store.url, folder)
        if place not in _LOADED:
            _LOADED[place] = self._find(
                f"{folder}/{TABLE_FILE}",
                settings,
                parse=table_from_bytes,
                make=lambda: TokenTable.of(SegmentTokenizer.load(model)),
                dump=table_to_bytes,
            )
            while len(_LOADED) > MAX_LOADED:
                del _LOADED[next(iter(_LOADED))]
        return _LOADED[place]

    def keep(self, source: ModelConfig, target: ModelConfig, version: int) -> Keep:
        """Return the storage of the maps between two vocabularies, next to the source's table.

        Args:
            source: the model whose vocabulary is mapped.
            target: the other.
            version: version of the algorithms that compute the maps.
        """
        source_settings, target_settings = table_settings(source), table_settings(target)
        folder = f"{_folder(source, source_settings)}/to-{_fingerprint(target_settings)}"

        def find(name: str, compute: Callable[[], np.ndarray]) -> np.ndarray:
            settings = {"map": name, "version": version, "source": source_settings, "target": target_settings}
            return self._find(
                f"{folder}/{name}.parquet", settings, parse=map_from_bytes, make=compute, dump=map_to_bytes
            )

        return find

    def _find(
        self,
        key: str,
        settings: Mapping[str, Any],
        *,
        parse: Callable[[bytes, Mapping[str, Any]], Content],
        make: Callable[[], Content],
        dump: Callable[[Content, Mapping[str, Any]], bytes],
    ) -> Content:
        """Read a file; make and write its content where it is missing, damaged, or of something else."""
        store = self._store
        if store is None:
            return make()
        is_there = True
        try:
            return parse(store.read(key), settings)
        except FileNotFoundError:
            is_there = False
        except DamagedTableError as error:
            log.warning("%s/%s: %s; it is rebuilt from the tokenizer", store.url, key, error)
        content = make()
        if self._may_write:
            try:
                write = store.replace if is_there else store.create
                write(key, dump(content, settings))
            except StoreError as error:  # a run directory that cannot be written to can be worked with
                log.warning("%s; the tokenizers will be loaded again next time", error)
        return content


IN_MEMORY: Final = TokenTables()
"""Tables of no run directory."""


def table_settings(model: ModelConfig) -> dict[str, Any]:
    """Return everything that a model's table depends on, as JSON values.

    These are the tokenizer's files, each setting of the model that says how they are used, the rows of its embedding, and the
    libraries that read a tokenizer.
    """
    usage = model.model_dump(mode="json", include=ModelConfig.model_fields.keys() - _NOT_OF_TOKENIZER)
    return {
        "version": TABLE_VERSION,
        "tokenizer": model.tokenizer_identity(),
        "rows": embedding_rows(model),
        "usage": usage,
        "libraries": dict(_library_versions()),
    }


@cache
def _library_versions() -> dict[str, str]:
    return {name: metadata.version(name) for name in _LIBRARIES}


def table_key(model: ModelConfig) -> str:
    """Return where a model's table is in a run directory."""
    return f"{_folder(model, table_settings(model))}/{TABLE_FILE}"


def is_table_file(key: str) -> bool:
    """Return whether a file of a run directory is a token table or a map."""
    return bool(_OF_TABLE.fullmatch(key) or _OF_MAP.fullmatch(key))


def check_file(key: str, raw: bytes) -> None:
    """Check a token table or a map on its own: its content is what was written, and it stands where it belongs.

    Raises:
        DamagedTableError: says what is wrong.
    """
    header, _ = _open(raw)
    settings = header.get("settings")
    if not isinstance(settings, dict):
        raise DamagedTableError("its metadata do not say what it was built from")
    (table_from_bytes if _OF_TABLE.fullmatch(key) else map_from_bytes)(raw, settings)
    folder = key.rsplit("/", 1)[0]
    actual = (
        folder.rsplit("/", 1)[-1]
        if _OF_TABLE.fullmatch(key)
        else "/".join(name.removeprefix("to-") for name in folder.split("/")[-2:])
    )
    expected = (
        _fingerprint(settings)
        if _OF_TABLE.fullmatch(key)
        else f"{_fingerprint(settings['source'])}/{_fingerprint(settings['target'])}"
    )
    if actual != expected:
        raise DamagedTableError(f"it was built for {expected}, but is in the folder of {actual}")


def is_of_this_version(key: str, raw: bytes) -> bool:
    """Return whether this ptafuse may still read a sound file, or would look for another in its place."""
    settings = _open(raw)[0]["settings"]
    tables = [settings] if _OF_TABLE.fullmatch(key) else [settings["source"], settings["target"]]
    return all(table["version"] == TABLE_VERSION for table in tables)


def table_to_bytes(table: TokenTable, settings: Mapping[str, Any]) -> bytes:
    """Return a table as a Parquet file.

    Args:
        table: the table.
        settings: inputs that it was made from.
    """
    vocabulary = table.vocabulary
    roles: list[str | None] = [None] * vocabulary.size
    for token_id, role in ((vocabulary.bos_id, "bos"), (vocabulary.eos_id, "eos")):
        if token_id is not None:
            roles[token_id] = role
    columns = [
        pa.array(np.arange(vocabulary.size, dtype=np.int32)),
        pa.array(vocabulary.token_bytes, pa.binary()),
        pa.array([_text(token) for token in vocabulary.token_bytes], pa.string()),
        pa.array(vocabulary.is_special),
        pa.array(vocabulary.is_marked),
        pa.array(roles, pa.string()),
    ]
    header = {
        "settings": settings,
        "bos_id": vocabulary.bos_id,
        "eos_id": vocabulary.eos_id,
        "prefix_id": table.prefix_id,
        "has_dummy_prefix": table.has_dummy_prefix,
        "spells_text": table.spells_text,
    }
    return _to_bytes(
        pa.Table.from_arrays(columns, schema=SCHEMA),
        header,
        _content(vocabulary.token_bytes, vocabulary.is_special, vocabulary.is_marked),
    )


def table_from_bytes(raw: bytes, settings: Mapping[str, Any]) -> TokenTable:
    """Read a Parquet file of ``table_to_bytes``.

    Args:
        raw: its bytes.
        settings: inputs that it must have been made from.

    Raises:
        DamagedTableError: it cannot be read, is not what was written, or was made from something else.
    """
    header, table = _open(raw, SCHEMA)
    token_bytes = tuple(table["bytes"].to_pylist())
    is_special = table["special"].to_numpy()
    is_marked = table["marked"].to_numpy()
    _check(header, _content(token_bytes, is_special, is_marked), settings)
    vocabulary = Vocabulary(token_bytes, is_marked, is_special, header["bos_id"], header["eos_id"])
    texts = table["text"].to_pylist()
    for token_id in np.flatnonzero(table["text"].is_null().to_numpy()).tolist():
        texts[token_id] = vocabulary.text(token_id)
    return TokenTable(vocabulary, header["prefix_id"], header["has_dummy_prefix"], header["spells_text"], tuple(texts))


def map_to_bytes(values: np.ndarray, settings: Mapping[str, Any]) -> bytes:
    """Return a map, (V,) int32, as a Parquet file; see ``table_to_bytes``."""
    columns = [pa.array(np.arange(len(values), dtype=np.int32)), pa.array(values, pa.int32())]
    return _to_bytes(pa.Table.from_arrays(columns, schema=_MAP_SCHEMA), {"settings": settings}, values.tobytes())


def map_from_bytes(raw: bytes, settings: Mapping[str, Any]) -> np.ndarray:
    """Read a Parquet file of ``map_to_bytes``; see ``table_from_bytes``."""
    header, table = _open(raw, _MAP_SCHEMA)
    values = table["value"].to_numpy()
    _check(header, values.tobytes(), settings)
    return values


def _folder(model: ModelConfig, settings: Mapping[str, Any]) -> str:
    return f"{FOLDER}/{model.name}/{_fingerprint(settings)}"


def _fingerprint(settings: Mapping[str, Any]) -> str:
    return sha256(canonical_json(settings).encode())[:FINGERPRINT_LENGTH]


def _text(token: bytes) -> str | None:
    try:
        return token.decode()
    except UnicodeDecodeError:
        return None


def _content(token_bytes: Sequence[bytes], is_special: np.ndarray, is_marked: np.ndarray) -> bytes:
    """Return what the sha256 of a table is taken of; the texts follow from the bytes."""
    lengths = np.fromiter(map(len, token_bytes), np.int32, len(token_bytes))
    return b"".join((lengths.tobytes(), is_special.tobytes(), is_marked.tobytes(), *token_bytes))


def _digest(header: Mapping[str, Any], content: bytes) -> str:
    said = {name: value for name, value in header.items() if name != "sha256"}
    return hashlib.sha256(canonical_json(said).encode() + b"\n" + content).hexdigest()


def _to_bytes(table: pa.Table, header: Mapping[str, Any], content: bytes) -> bytes:
    text = canonical_json({**header, "sha256": _digest(header, content)})
    buffer = io.BytesIO()
    # The checksums guard what the sha256 does not cover: columns that follow from others.
    pq.write_table(
        table.replace_schema_metadata({_METADATA: text.encode()}),
        buffer,
        compression="zstd",
        use_dictionary=[name for name in table.schema.names if name != "id"],
        column_encoding={"id": "DELTA_BINARY_PACKED"},
        write_page_checksum=True,
    )
    return buffer.getvalue()


def _open(raw: bytes, schema: pa.Schema | None = None) -> tuple[dict[str, Any], pa.Table]:
    """Return a file's header and rows.

    Raises:
        DamagedTableError: it cannot be read, or has other columns.
    """
    try:
        with pq.ParquetFile(pa.BufferReader(raw), page_checksum_verification=True) as file:
            table = file.read(use_threads=False)
        header: dict[str, Any] = json.loads(table.schema.metadata[_METADATA])
    except (pa.ArrowException, OSError, ValueError, KeyError, TypeError) as error:
        raise DamagedTableError(f"damaged: it cannot be read ({str(error).splitlines()[0]})") from error
    if schema is not None and not table.schema.equals(schema, check_metadata=False):
        raise DamagedTableError(f"damaged: its columns are {', '.join(table.schema.names)}")
    return header, table


def _check(header: Mapping[str, Any], content: bytes, settings: Mapping[str, Any]) -> None:
    """Refuse a file whose content is not what was written, or was made from something else.

    Raises:
        DamagedTableError: says which.
    """
    if header.get("sha256") != _digest(header, content):
        raise DamagedTableError("damaged: the sha256 of its content differs from the one that was written")
    if header["settings"] != settings:
        raise DamagedTableError("stale: it was built from another tokenizer, or in another way")
