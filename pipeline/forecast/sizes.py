"""Amount of text and number of parameters of a run, from local information only.

Nothing is fetched, and no model is loaded.
"""

import math
import re
from dataclasses import dataclass

from pipeline.dataset.documents import plan_documents
from pipeline.dataset.find import find_files
from pipeline.dataset.formats import FORMATS
from pipeline.forecast.estimate import Assumed, Sizes
from pipeline.run.shard_plan import ShardPlan
from pipeline.settings.planning import HUB_DATASETS
from pipeline.settings.run import RunConfig
from pipeline.settings.texts import TextConfig
from pipeline.state.status import StepStatus
from stages.models.config import ModelConfig
from stages.models.weights import stored_tensors
from stages.shard.config import DatasetConfig

_TEXT_RANGE = 4000
"""Documents of a range of an evaluated text; any number counts the same."""
COUNTED_BYTES = 2**28
"""Local files of no more bytes than this are read to count their documents."""
_PARAMETERS = re.compile(r"(?<![0-9a-z.])(\d+(?:\.\d+)?)(b|m)(?![0-9a-z])", re.IGNORECASE)


def measure_sizes(config: RunConfig, plan: ShardPlan | None, shard: StepStatus, assumed: Assumed) -> Sizes:
    """Measure the amount of text: from finished shards, else from the dataset's files or its card.

    Args:
        config: configuration of the run.
        plan: the frozen plan, if there is one.
        shard: state of the shard step.
        assumed: assumptions that are used where nothing is known.

    Raises:
        ValueError: the size of the dataset is unknown; says what to set.
    """
    names = [model.name for model in config.models]
    documents, text_bytes = shard.health.get("documents"), shard.health.get("bytes")
    if plan is not None and shard.shards and isinstance(documents, int) and isinstance(text_bytes, int):
        factor = plan.num_shards / len(shard.shards)
        counted = {name: shard.health.get(f"tokens/{name}") for name in names}
        tokens = {
            name: factor * (count if isinstance(count, int) else text_bytes / assumed.take("bytes_per_token"))
            for name, count in counted.items()
        }
        return Sizes(_planned_documents(plan), text_bytes * factor, tokens, f"{len(shard.shards)} shards that are done")
    num_documents, num_bytes, source = dataset_size(config, assumed)
    if plan is not None:
        num_documents = _planned_documents(plan)
    tokens = dict.fromkeys(names, num_bytes / assumed.take("bytes_per_token"))
    return Sizes(num_documents, num_bytes, tokens, source)


def dataset_size(config: RunConfig, assumed: Assumed) -> tuple[int | None, float, str]:
    """Return the number of documents (None: unknown), the bytes of text, and where these figures are from.

    Raises:
        ValueError: no source of the size is available; the message says what to set.
    """
    dataset = config.dataset
    num_documents, text_bytes = assumed.values.num_documents, assumed.values.text_bytes
    source = "assumptions.text_bytes"
    if text_bytes is None and dataset.hub is not None:
        card = HUB_DATASETS.get((dataset.hub, dataset.split or "train"))
        if card is None:
            raise ValueError(
                f"the size of {dataset.hub} is unknown, and planning does not access the network: give it with --set "
                "assumptions.num_documents=... --set assumptions.text_bytes=... (both are on the dataset's card)"
            )
        num_documents, text_bytes = num_documents or card[0], float(card[1])
        source = f"the card of {dataset.hub}"
    elif text_bytes is None:
        counted, text_bytes = _files_size(dataset, config.shard.documents_per_shard, assumed)
        num_documents = num_documents or counted
        source = f"the files of {dataset.path}"
    assert text_bytes is not None
    if dataset.max_documents is None:
        return num_documents, text_bytes, source
    if num_documents is None:
        raise ValueError(
            "dataset.max_documents selects a part of the text, and the number of documents is unknown: give it with "
            "--set assumptions.num_documents=..."
        )
    fraction = min(1.0, dataset.max_documents / num_documents)
    return min(num_documents, dataset.max_documents), text_bytes * fraction, source


def evaluated_text_bytes(text: TextConfig, assumed: Assumed) -> float:
    """Return about how many bytes of a text are scored, before any overlap with the training text is known.

    Raises:
        ValueError: its size is unknown; says what to set.
    """
    if text.hub is None:
        num_documents, num_bytes = _files_size(text, _TEXT_RANGE, assumed)
    else:
        card = HUB_DATASETS.get((text.hub, text.split or "train"))
        num_documents, num_bytes = (card[0], float(card[1])) if card else (None, math.inf)
    if num_documents is not None and text.max_documents is not None:
        num_bytes *= min(1.0, text.max_documents / num_documents)
        num_documents = min(num_documents, text.max_documents)
    if text.fraction is not None:
        num_bytes *= text.fraction
        num_documents = None if num_documents is None else round(num_documents * text.fraction)
    chosen = text.num_documents if text.num_documents is not None else num_documents
    if text.num_documents is not None and num_documents:
        num_bytes *= min(1.0, text.num_documents / num_documents)
        chosen = min(text.num_documents, num_documents)
    if chosen is not None and text.max_characters is not None:
        num_bytes = min(num_bytes, float(chosen * text.max_characters))
    if math.isinf(num_bytes):
        raise ValueError(
            f"the size of {text.section} is unknown, and planning does not access the network: set num_documents and "
            "max_characters there"
        )
    return num_bytes


@dataclass(frozen=True)
class Parameters:
    """Number of parameters of a model, and where it is from."""

    count: float
    source: str


def count_parameters(model: ModelConfig, assumed: Assumed) -> Parameters:
    """Find the number of parameters of a model: as given, from its local weights, or from its name ("Llama-2-7b").

    Raises:
        ValueError: no source of the size is available; the message says what to set.
    """
    given = assumed.values.parameters.get(model.name)
    if given is not None:
        return Parameters(given, f"assumptions.parameters.{model.name}")
    if model.path is not None and model.path.is_dir():
        tensors = stored_tensors(model.path)
        if tensors:
            return Parameters(float(sum(tensor.num_elements for tensor in tensors.values())), "its weights")
    name = model.hub or str(model.path)
    counts = _PARAMETERS.findall(name.rsplit("/", 1)[-1])
    if not counts:
        raise ValueError(
            f"the number of parameters of {name} is unknown: give it with --set assumptions.parameters.{model.name}=7e9"
        )
    number, unit = counts[-1]
    return Parameters(float(number) * (1e9 if unit.lower() == "b" else 1e6), "its name")


def _planned_documents(plan: ShardPlan) -> int:
    return sum(shard.num_documents for shard in plan.ranges)


def _files_size(dataset: DatasetConfig, documents_per_shard: int, assumed: Assumed) -> tuple[int | None, float]:
    files = find_files(dataset)
    sizes = {name: files.filesystem.size(path) for name, path in files.paths.items()}
    is_compact = FORMATS[files.format].is_compact
    text_bytes = sum(
        size * assumed.take("expansion") if is_compact or files.is_compressed(name) else size
        for name, size in sizes.items()
    )
    if not files.is_local or sum(sizes.values()) > COUNTED_BYTES:
        return None, text_bytes
    everything = dataset.model_copy(update={"max_documents": None})
    return sum(shard.num_documents for shard in plan_documents(everything, documents_per_shard)), text_bytes
