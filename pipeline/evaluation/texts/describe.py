"""Description of how much of a text is scored."""

from collections.abc import Mapping


def describe_counts(counts: Mapping[str, int]) -> str:
    """Describe how much of a text is scored and what is left out.

    Args:
        counts: documents of the corpus (``documents``), those that were chosen (``chosen``), their outcomes
            (``unreadable``, ``overlapping``, ``uncut``, ``scored``), and kinds in the corpus and among the scored ones
            (``kinds``, ``scored_kinds``; 0 without ``kind_column``).
    """
    left_out = [
        f"{counts[name]:,} {words}"
        for name, words in (
            ("overlapping", "that share text with the training documents"),
            ("unreadable", "that are empty or not text"),
            ("uncut", "that cannot be cut to fit every tokenizer, or that a chat template refuses"),
        )
        if counts[name]
    ]
    shown = f"{counts['scored']:,} of {counts['chosen']:,} chosen documents ({counts['documents']:,} in the corpus)"
    words = f"{shown}; left out: {', '.join(left_out)}" if left_out else shown
    missing = counts["kinds"] - counts["scored_kinds"]
    return f"{words}; {missing} of its {counts['kinds']} kinds have no document among these" if missing else words
