"""Which settings decide what text is scored."""

from pathlib import Path

from pipeline.settings.documents import DECIDES, scored_documents
from pipeline.settings.load import load_config

OTHER = {
    "dataset": {"kind_column"},
    "shard": {"documents_per_shard", "max_bad_fraction", "num_workers", "cpus_per_worker"},
    "eval": {
        *("max_length", "dtype", "attention", "device", "cpus_per_worker", "batch_tokens", "chunk_positions"),
        *("suites", "suite_models", "data", "limit", "suite_batch_size", "execute_code"),
        *("apply_chat_template", "num_generations", "generation_tokens", "texts"),
    },
}
"""Settings of the same sections that say how text is scored, or where and how that is computed."""


def test_every_setting_of_the_text_either_decides_what_is_scored_or_not(tiny_config: Path) -> None:
    config = load_config(tiny_config)
    for section, other in OTHER.items():
        deciding = {key.partition(".")[2] for key in DECIDES if key.startswith(f"{section}.")}
        fields = type(getattr(config, section)).model_fields
        assert sorted([*deciding, *other]) == sorted(fields)
    assert tuple(scored_documents(config)) == DECIDES
