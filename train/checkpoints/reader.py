"""Read a checkpoint of torch.distributed.checkpoint without trusting its table of contents.

``.metadata`` is a pickle, and unpickling calls whatever it names. Here it may name the few classes that such a table is
made of, and nothing else. The tensors themselves are read by torch with ``weights_only``.
"""

import pickle
from typing import Any, Final

from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta

_METADATA: Final = "torch.distributed.checkpoint.metadata"
_DTYPES: Final = ("bfloat16", "bool", "float16", "float32", "float64", "int32", "int64", "uint8")
_ALLOWED: Final = frozenset(
    {
        ("pathlib", "PosixPath"),
        ("torch", "Size"),
        *(("torch", dtype) for dtype in _DTYPES),
        ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
        (_METADATA, "ChunkStorageMetadata"),
        (_METADATA, "Metadata"),
        (_METADATA, "MetadataIndex"),
        (_METADATA, "StorageMeta"),
        (_METADATA, "TensorProperties"),
        (_METADATA, "TensorStorageMetadata"),
        (_METADATA, "_MEM_FORMAT_ENCODING"),
        ("torch.serialization", "_get_layout"),
    }
)


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        # Only Python 3.13 reports this, and another Python version may have written the checkpoint.
        module = "pathlib" if module == "pathlib._local" else module
        if (module, name) not in _ALLOWED:
            raise pickle.UnpicklingError(f"it names {module}.{name}")
        return super().find_class(module, name)


class CheckpointReader(FileSystemReader):
    """torch's reader of a checkpoint folder, with a restricted unpickler for ``.metadata``."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """Read the table of contents.

        Raises:
            ValueError: the file is damaged, or names what no checkpoint of ours names.
        """
        del args
        path = self._get_metadata_path(kwargs.get("rank"))
        try:
            with self.fs.create_stream(path, "rb") as file:
                metadata = _Unpickler(file).load()
        except (pickle.UnpicklingError, EOFError, AttributeError, ImportError, IndexError) as error:
            raise ValueError(
                f"{path} is not a checkpoint's table of contents ({error}): remove its folder to continue from the "
                "previous checkpoint"
            ) from error
        if not isinstance(metadata, Metadata):
            raise ValueError(  # noqa: TRY004 - what a file holds, not what a caller gave
                f"{path} holds a {type(metadata).__name__}, not a checkpoint's table of contents"
            )
        if metadata.storage_meta is None:
            metadata.storage_meta = StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata
