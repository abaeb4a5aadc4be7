"""Adapt stage: train sources on the run's own text, each in two folds, before their logits are dumped.

The model of a fold dumps the fold's shards and is trained on all others, without the documents that also occur in the fold:
a model that has seen a document gives its tokens away.
"""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.engine.train_stage import run_job
from pipeline.run.session import Run, StageError, command, require_complete
from pipeline.run.sharing import shared_store
from pipeline.run.stage_table import adapted_source
from pipeline.run.steps import Step
from pipeline.run.trained_model import checkpoint_store, import_model, is_trained, local_folder
from pipeline.settings.adapt import fold_of
from stages.contract.columns import list_column
from stages.contract.schemas import has_conversations, id_type
from stages.fuse.pack import Packing, pack
from stages.models.segment_text import segment_texts
from stages.models.tokenizer import SegmentTokenizer
from train.job import FusedFile, TrainJob


def run_adapt(run: Run) -> None:
    """Train every source that has ``adapt``, once for each fold.

    A model that ``logits_from`` has is copied. Blocks of all folds are written before any model is trained.

    Raises:
        StageError: the shard stage is incomplete, a fold has nothing to train on, or a training failed; says why.
    """
    steps = run.resolved.of_stage("adapt")
    if not steps:
        run.console.print("adapt: nothing to do (no source has `adapt`)")
        return
    num_shards = require_complete(run, ["shard"], "adapt")
    other = shared_store(run.config)
    pending = []
    for step in steps:
        if is_trained(run, step):
            run.console.print(f"{step.key}: nothing to do (the model is trained)")
        elif other is not None and import_model(run, step, other):
            run.console.print(f"{step.key}: the model is copied from {other.url}", soft_wrap=True)
        else:
            pending.append(step)
    digests = (
        {shard: _document_digests(rows) for shard, rows in _training_rows(run, range(num_shards))} if pending else {}
    )
    jobs = [(step, _job(run, step, digests)) for step in pending]
    for step, job in jobs:
        run_job(run, step, job)


def _job(run: Run, step: Step, digests: Mapping[int, Mapping[int, bytes]]) -> TrainJob:
    """Write the blocks that the model of a fold is trained on, and describe the training.

    Args:
        run: the run.
        step: the step of a source and a fold.
        digests: shard -> document -> hash of its content.
    """
    source, fold = adapted_source(run.config, step.model)
    assert source.adapt is not None
    tokenizer = SegmentTokenizer.load(source)
    dumped = {digest for shard in digests if fold_of(shard) == fold for digest in digests[shard].values()}
    others = [shard for shard in digests if fold_of(shard) != fold]
    files = []
    num_left_out = 0
    for shard, rows in _training_rows(run, others):
        seen = [doc_id for doc_id, digest in digests[shard].items() if digest in dumped]
        num_left_out += len(seen)
        kept = rows.filter(pc.invert(pc.is_in(rows["doc_id"], pa.array(seen, pa.int64()))))
        blocks = source_blocks(kept, tokenizer, max_length=source.adapt.max_length)
        if not blocks.num_rows:
            continue  # all its documents are held out, or hold no text
        data = run.store.write_table(f"{step.folder}/blocks/shard-{shard:05d}.parquet", blocks)
        files.append(FusedFile(path=run.store.full_url(data.key), sha256=data.sha256))
    if num_left_out:
        run.console.print(f"{step.key}: {num_left_out} documents are left out: the fold that it dumps has equal ones")
    if not files:
        raise StageError(
            f"{step.key} is trained on the shards that it does not dump, and these {len(others)} of {len(digests)} "
            f"contain no text to train on{' that the others do not hold, too' if num_left_out else ''}: lower "
            "shard.documents_per_shard, so that both halves of the shards do, then run "
            f"{command(run, 'shard')} and the stages after it"
        )
    return TrainJob(
        config=source.adapt.training(run.config.train, isolate=source.reads_conversations),
        model=source,
        files=tuple(files),
        output=str(local_folder(run, step)),
        fingerprint=step.fingerprint,
        provenance={
            "target": {"name": source.name, "weights": source.weights_identity()},
            "sources": [],
            "stages": {step.key: {"fingerprint": step.fingerprint, "settings": dict(step.settings)}},
        },
        checkpoint_store=checkpoint_store(run, step),
    )


def _training_rows(run: Run, shards: Sequence[int]) -> Iterator[tuple[int, pa.Table]]:
    """Yield the rows of shards that are trained on and dumped: those of no held-out document."""
    manifests = run.store.manifests(run.resolved.steps["shard"].folder)
    for shard in shards:
        table = run.store.read_table(manifests[shard].data, remake="`make shard`")
        yield shard, table.filter(pc.equal(table["split"], "train"))


def _document_digests(rows: pa.Table) -> dict[int, bytes]:
    """Return a hash of the content of each document of a shard: its segments' text, and who says what of it."""
    digests: dict[int, Any] = {}
    columns = [name for name in ("text", "message_role", "message_end", "message_trained") if name in rows.schema.names]
    for row in rows.select(["doc_id", *columns]).to_pylist():
        digest = digests.setdefault(row["doc_id"], hashlib.sha256())
        digest.update(repr([row[name] for name in columns]).encode("utf-8", "surrogatepass"))
    return {doc_id: digest.digest() for doc_id, digest in digests.items()}


def source_blocks(rows: pa.Table, tokenizer: SegmentTokenizer, *, max_length: int) -> pa.Table:
    """Pack segments, under a source's tokenizer, into training blocks.

    Args:
        rows: a table of ``schemas.SHARD``.
        tokenizer: tokenizer of the source.
        max_length: tokens of a block; a longer segment has a separate block.

    Returns:
        The columns of ``schemas.fused_schema`` that a training on gold tokens reads.
    """
    encodings = tokenizer.encode_segments(segment_texts(rows))
    lengths = np.array([len(encoding.ids) for encoding in encodings], np.int64)
    # A longer segment counts as one that fills a block: nothing else goes into its block, and other blocks stay as they are.
    packing = pack(np.minimum(lengths, max_length), max_length=max_length, packing="whole")
    packing = replace(packing, length=lengths[packing.segment])
    flat = np.concatenate([encoding.ids for encoding in encodings]) if encodings else np.empty(0, np.int32)
    doc_ids, segments = (rows[name].to_numpy() for name in ("doc_id", "segment"))
    columns = {
        "block": pa.array(np.arange(packing.num_blocks), pa.int32()),
        "token_ids": list_column(
            _by_block(packing, flat[packing.tokens(lengths)], tokens=True), id_type(tokenizer.vocabulary.size)
        ),
        "piece_start": list_column(_by_block(packing, packing.start), pa.int32()),
        "piece_doc_id": list_column(_by_block(packing, doc_ids[packing.segment]), pa.int64()),
        "piece_segment": list_column(_by_block(packing, segments[packing.segment]), pa.int32()),
        "piece_offset": list_column(_by_block(packing, packing.offset), pa.int32()),
    }
    if has_conversations(rows.schema):
        trained = [encoding.is_trained for encoding in encodings if encoding.is_trained is not None]
        is_trained = np.concatenate([np.empty(0, bool), *trained])
        columns["is_trained"] = list_column(
            _by_block(packing, is_trained[packing.tokens(lengths)], tokens=True), pa.bool_()
        )
    return pa.table(columns)


def _by_block(packing: Packing, values: np.ndarray, *, tokens: bool = False) -> list[np.ndarray]:
    """Split values of all pieces, or of all tokens, into those of each block."""
    if not packing.num_blocks:
        return []
    sizes = np.bincount(packing.block, packing.length if tokens else None, minlength=packing.num_blocks)
    return np.split(values, np.cumsum(sizes.astype(np.int64))[:-1])
