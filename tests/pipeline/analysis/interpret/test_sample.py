import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.analysis.interpret.sample import choose_rows, choose_shards, length_kind


def test_shards_are_drawn_by_seed_and_a_larger_sample_holds_the_smaller():
    few, more = (set(choose_shards(100, max_shards=count, seed=1)) for count in (5, 20))
    assert len(few) == 5
    assert few < more
    assert choose_shards(100, max_shards=5, seed=1) == sorted(few)
    assert set(choose_shards(100, max_shards=5, seed=2)) != few
    assert choose_shards(3, max_shards=8, seed=1) == [0, 1, 2]


@given(st.lists(st.tuples(st.integers(0, 6), st.integers(0, 50)), max_size=20), st.integers(1, 200), st.integers(0, 3))
@settings(max_examples=50)
def test_rows_are_those_of_whole_documents_until_there_are_enough(rows, max_positions, seed):
    doc_ids, sizes = (np.array([row[part] for row in rows], np.int64) for part in (0, 1))
    chosen = choose_rows(doc_ids, sizes, max_positions=max_positions, seed=seed)
    assert chosen == sorted(set(chosen))
    documents = set(doc_ids[chosen].tolist())
    assert chosen == [row for row, doc_id in enumerate(doc_ids.tolist()) if doc_id in documents]
    total = sizes[chosen].sum()
    assert total >= min(max_positions, sizes.sum())
    if total > max_positions:  # without the last drawn document there were not enough
        assert any(
            sizes[doc_ids != last][np.isin(doc_ids[doc_ids != last], list(documents))].sum() < max_positions
            for last in documents
        )


def test_kinds_by_length_are_half_open():
    sizes = (0, 999, 1000, 3999, 4000, 15_999, 16_000, 63_999, 64_000)
    assert [length_kind(size) for size in sizes] == [
        "under 1 kB",
        "under 1 kB",
        "1 to 4 kB",
        "1 to 4 kB",
        "4 to 16 kB",
        "4 to 16 kB",
        "16 to 64 kB",
        "16 to 64 kB",
        "over 64 kB",
    ]
