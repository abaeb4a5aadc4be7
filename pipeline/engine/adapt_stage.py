"""Adapt stage: train sources on the run's own text, each in two folds, before their logits are dumped."""

from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.engine.train_stage import run_job
from pipeline.run.session import Run, StageError, command, require_complete
from pipeline.run.stage_table import adapted_source
from pipeline.run.steps import Step
from pipeline.run.trained_model import checkpoint_store, is_trained, local_folder
from pipeline.settings.adapt import SourceConfig, fold_of
from stages.contract.columns import list_column
from stages.contract.schemas import has_conversations, id_type
from stages.fuse.pack import Packing, pack
from stages.models.segment_text import segment_texts
from stages.models.tokenizer import SegmentTokenizer
from train.job import FusedFile, TrainJob


def run_adapt(run: Run) -> None:
    """Train every source that has ``adapt``, once for each fold.

    Raises:
        StageError: the shard stage is incomplete, there is only one shard, or a training failed; says why.
    """
    steps = run.resolved.of_stage("adapt")
    if not steps:
        run.console.print("adapt: nothing to do (no source has `adapt`)")
        return
    num_shards = require_complete(run, ["shard"], "adapt")
    for step in steps:
        if is_trained(run, step):
            run.console.print(f"{step.key}: nothing to do (the model is trained)")
            continue
        source, fold = adapted_source(run.config, step.model)
        run_job(run, step, _job(run, step, source, _other_shards(run, fold, num_shards)))


def _other_shards(run: Run, fold: str, num_shards: int) -> list[int]:
    """Return the shards that the model of a fold is trained on: none of those that it will dump."""
    shards = [shard for shard in range(num_shards) if fold_of(shard) != fold]
    if num_shards < 2:
        raise StageError(
            "adapt trains on one half of the shards and dumps the other, and this run has one shard: lower "
            f"shard.documents_per_shard, then run {command(run, 'shard')} and the stages after it"
        )
    return shards


def _job(run: Run, step: Step, source: SourceConfig, shards: Sequence[int]) -> TrainJob:
    assert source.adapt is not None
    tokenizer = SegmentTokenizer.load(source)
    manifests = run.store.manifests(run.resolved.steps["shard"].folder)
    files = []
    for shard in shards:
        table = run.store.read_table(manifests[shard].data, remake="`make shard`")
        blocks = source_blocks(table, tokenizer, max_length=source.adapt.max_length)
        if not blocks.num_rows:
            continue  # all its documents are held out, or hold no text
        data = run.store.write_table(f"{step.folder}/blocks/shard-{shard:05d}.parquet", blocks)
        files.append(FusedFile(path=run.store.full_url(data.key), sha256=data.sha256))
    if not files:
        raise StageError(
            f"{step.key}: its {len(shards)} shards contain no training text; see `ptafuse status {run.store.url}`"
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


def source_blocks(shard: pa.Table, tokenizer: SegmentTokenizer, *, max_length: int) -> pa.Table:
    """Pack the train segments of a shard, under a source's tokenizer, into training blocks.

    Args:
        shard: a table of ``schemas.SHARD``.
        tokenizer: tokenizer of the source.
        max_length: tokens of a block; a longer segment gets its own block.

    Returns:
        The columns of ``schemas.fused_schema`` that a training on gold tokens reads.
    """
    rows = shard.filter(pc.equal(shard["split"], "train"))
    encodings = tokenizer.encode_segments(segment_texts(rows))
    lengths = np.array([len(encoding.ids) for encoding in encodings], np.int64)
    packing = pack(lengths, max_length=int(max([max_length, *lengths])), packing="whole")
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
    if has_conversations(shard.schema):
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
