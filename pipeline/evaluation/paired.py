"""Differences between two evaluations, document by document."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from stages.measures.kinds import KindFigures, kind_figures
from stages.measures.standard_error import Estimate, weighted_mean


class OtherDocumentsError(ValueError):
    """Figures of different documents cannot be paired."""


def paired_difference(result: Mapping[str, Any], baseline: Mapping[str, Any]) -> Estimate:
    """Compute the difference in bits per byte on the same documents, with its standard error over documents.

    Args:
        result: an evaluation, as ``read_result`` gives it.
        baseline: the evaluation it is compared with.

    Returns:
        result - baseline over all bytes (negative: better), and the standard error of that difference, from the
        documents' differences weighted by their bytes (the ratio estimator); NaN for fewer than two documents.

    Raises:
        OtherDocumentsError: see ``document_differences``.
    """
    return weighted_mean(*document_differences(result, baseline))


def document_differences(
    result: Mapping[str, Any], baseline: Mapping[str, Any], *, same_documents: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """Compute each document's difference in bits per byte, (D,), and its bytes, (D,).

    A document of which a model had nothing to predict (one token, without BOS) has no figure: it is left out here too.

    Args:
        result: an evaluation.
        baseline: the evaluation it is compared with.
        same_documents: the caller knows that the same documents were scored; so does, without it, who finds the same
            shards and split, or the same other text, in the recorded settings of the evaluations.

    Raises:
        OtherDocumentsError: one has a document that the other lacks, and they may have been scored on different documents.
    """
    pairs = _paired_documents(result, baseline, same_documents=same_documents)
    differences = np.array([document["bits_per_byte"] - other["bits_per_byte"] for document, other in pairs])
    return differences, np.array([document["num_bytes"] for document, _ in pairs], dtype=np.float64)


def document_kinds(
    result: Mapping[str, Any], baseline: Mapping[str, Any] | None = None, *, same_documents: bool = False
) -> list[str] | None:
    """Return the kinds of the documents of an evaluation, or of those that ``document_differences`` pairs, in their order.

    None where the documents have no kinds.

    Raises:
        OtherDocumentsError: see ``document_differences``.
    """
    pairs = _paired_documents(result, result if baseline is None else baseline, same_documents=same_documents)
    kinds = [document.get("kind") for document, _ in pairs]
    return None if not kinds or None in kinds else [str(kind) for kind in kinds]


def figures_by_kind(result: Mapping[str, Any]) -> KindFigures | None:
    """Return an evaluation's bits per byte by kind of document; None where the documents have no kinds."""
    kinds = document_kinds(result)
    if kinds is None:
        return None
    figures = np.array([document["bits_per_byte"] for document in result["documents"]])
    return kind_figures(
        figures, np.array([document["num_bytes"] for document in result["documents"]], np.float64), kinds
    )


def differences_by_kind(result: Mapping[str, Any], baseline: Mapping[str, Any]) -> KindFigures | None:
    """Return the paired differences in bits per byte by kind of document; None where the documents have no kinds.

    Raises:
        OtherDocumentsError: see ``document_differences``.
    """
    kinds = document_kinds(result, baseline)
    return None if kinds is None else kind_figures(*document_differences(result, baseline), kinds)


def _paired_documents(
    result: Mapping[str, Any], baseline: Mapping[str, Any], *, same_documents: bool
) -> list[tuple[Mapping[str, Any], Mapping[str, Any]]]:
    after, before = ({entry["doc_id"]: entry for entry in evaluation["documents"]} for evaluation in (result, baseline))
    lacking = after.keys() ^ before.keys()
    if lacking and not same_documents and not _have_same_documents(result, baseline):
        raise OtherDocumentsError(
            f"results on different documents cannot be paired: of {len(after.keys() | before.keys())} documents "
            f"{len(lacking)} are in only one of the two evaluations"
        )
    return [(entry, before[doc_id]) for doc_id, entry in after.items() if doc_id in before]


def _have_same_documents(result: Mapping[str, Any], baseline: Mapping[str, Any]) -> bool:
    """Return whether both evaluations recorded the same split of the same shards, or the same other text."""
    if "settings" not in result or "settings" not in baseline:
        return False
    result_ids, baseline_ids = (
        (
            *(evaluation["settings"]["inputs"].get(name) for name in ("shard", "documents", "tokenizers")),
            evaluation["settings"].get("text"),
            *(evaluation["settings"]["eval"].get(name) for name in ("split", "max_documents")),
        )
        for evaluation in (result, baseline)
    )
    return result_ids == baseline_ids
