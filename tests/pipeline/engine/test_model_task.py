"""Where models are loaded: in this process, or in a Ray task with room for them."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import ray
from rich.console import Console
from transformers import AutoModelForCausalLM

from pipeline.engine.model_task import run_with_model
from pipeline.run.session import Run, open_run
from pipeline.run.steps import Request
from stages.contract.filesystem import StoreError
from stages.models.weights import WeightFileError
from tests.tiny_run import ptafuse, ptafuse_process


def open_tiny(tiny_config: Path, folder: Path, *overrides: str, local: bool = False) -> Run:
    return open_run(Request(str(tiny_config), overrides), str(folder / "run"), Console(quiet=True), local=local)


def work(run: Run, count: int) -> Iterator[object]:
    """Yield this process's number, what it was given, what it sees of the run, what it has; then fail."""
    yield os.getpid()
    yield from range(count)
    yield run.store.exists("configs"), run.config.name, sorted(run.resolved.steps)
    if count:
        yield dict(ray.get_runtime_context().get_assigned_resources())
        yield os.environ.get("HF_TOKEN")
        raise FileNotFoundError("no weights at /nowhere")


def die_twice(run: Run, folder: Path) -> Iterator[int]:
    count = len(list(folder.iterdir()))
    if count < 2:
        (folder / str(count)).touch()
        os._exit(1)
    yield count


def test_local_work_is_done_in_this_process_as_it_comes(tiny_config: Path, tmp_path: Path) -> None:
    run = open_tiny(tiny_config, tmp_path, local=True)
    found = run_with_model(run, "eval/llama", work, 0)
    assert next(found) == os.getpid()
    assert next(found) == (True, "tiny", sorted(run.resolved.steps))
    assert list(found) == []


@pytest.mark.parametrize(
    ("error", "kind", "message"),
    [
        (
            WeightFileError(Path("a"), "cut short", "a file", "Fetch it"),
            ValueError,
            "a: cut short; expected a file. Fetch it",
        ),
        (FileNotFoundError("no weights"), FileNotFoundError, "no weights"),
        (StoreError("the disk is full"), OSError, "the disk is full"),
        (FloatingPointError("not finite"), FloatingPointError, "not finite"),
        (KeyError("name"), RuntimeError, "KeyError: 'name'. PTAFUSE_TRACEBACK=1 shows where it comes from"),
    ],
)
def test_an_error_of_a_task_arrives_as_its_kind_and_words(
    tiny_config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, kind: type, message: str
) -> None:
    monkeypatch.delenv("PTAFUSE_TRACEBACK", raising=False)
    run = open_tiny(tiny_config, tmp_path)

    def fail(run: Run) -> Iterator[int]:
        yield 1
        raise error

    def call(what: str, function: Callable[..., Iterator[object]], arguments: tuple, **_: object) -> Iterator[object]:
        return function(0, *arguments)

    monkeypatch.setattr("pipeline.engine.ray_task.run_task", call)
    found = run_with_model(run, "eval/llama", fail)
    assert next(found) == 1
    with pytest.raises(kind) as raised:
        next(found)
    assert type(raised.value) is kind
    assert str(raised.value) == message


def reserved(
    tiny_config: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, *overrides: str, cluster_gpus: int = 0
) -> tuple[float, float]:
    """Return the CPUs and GPUs that a task would reserve on a cluster that is joined."""
    asked: list[tuple[float, float]] = []

    def call(*_: object, cpus: float, gpus: Callable[[], float], **__: object) -> Iterator[object]:
        asked.append((cpus, gpus()))
        return iter(())

    monkeypatch.setattr("pipeline.engine.ray_task.run_task", call)
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 64.0, "GPU": float(cluster_gpus)})
    run = open_tiny(tiny_config, folder, *overrides)
    assert list(run_with_model(run, "eval/llama", work, 0)) == []
    return asked[0]


@pytest.mark.parametrize(
    ("overrides", "cluster_gpus", "expected"),
    [
        ((), 0, (1, 0)),
        ((), 8, (1, 1)),
        (("eval.device='cpu'", "train.cpus_per_worker=4"), 8, (4, 0)),
        (("eval.device='cuda'", "train.cpus_per_worker=4", "eval.cpus_per_worker=2"), 0, (2, 1)),
    ],
)
def test_a_task_reserves_what_the_section_asks_for(
    tiny_config: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    overrides: tuple[str, ...],
    cluster_gpus: int,
    expected: tuple[float, float],
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    assert reserved(tiny_config, tmp_path, monkeypatch, *overrides, cluster_gpus=cluster_gpus) == expected


@pytest.mark.parametrize(
    ("overrides", "gpus"),
    [
        (("train.device='cuda'",), 1),
        (("train.gpus_per_worker=1",), 1),
        (("train.device='cpu'",), 0),
        (("train.device='cuda'", "eval.device='cpu'"), 0),
        (("train.device='cpu'", "eval.device='cuda'"), 1),
    ],
)
def test_on_a_cluster_that_can_grow_a_model_is_evaluated_where_it_was_trained(
    tiny_config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, overrides: tuple[str, ...], gpus: float
) -> None:
    """Its GPU machines may be gone at the moment, and CPUs would take the task in silence."""
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    assert reserved(tiny_config, tmp_path, monkeypatch, *overrides)[1] == gpus


def test_a_task_with_a_gpu_reserved_never_computes_on_cpus(
    tiny_config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def call(what: str, function: Callable[..., Iterator[object]], arguments: tuple, **_: object) -> Iterator[object]:
        return function(1, *arguments)

    monkeypatch.setattr("pipeline.engine.ray_task.run_task", call)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    run = open_tiny(tiny_config, tmp_path)
    with pytest.raises(ValueError, match=r"eval/llama has a GPU reserved on .*, and torch sees no GPU there"):
        next(run_with_model(run, "eval/llama", work, 0))


def test_a_task_reads_the_environment_before_the_hub_library_does() -> None:
    """``huggingface_hub`` reads its variables when it is imported, and Ray imports the work before it calls it."""
    modules = "pipeline.engine.ray_task, pipeline.evaluation.eval_stage, pipeline.evaluation.suites.run"
    code = f"import sys, {modules}; sys.exit('huggingface_hub' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.fixture
def _no_ray_left() -> Iterator[None]:
    yield
    ray.shutdown()


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.usefixtures("_no_ray_left")
def test_work_on_ray_is_a_task_with_resources_and_its_errors_arrive_in_words(
    tiny_config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.chdir(tmp_path)
    run = open_tiny(tiny_config, Path(), "eval.device='cpu'", "train.cpus_per_worker=2")
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[3]))  # workers import this file
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    monkeypatch.setenv("HF_TOKEN", "of the driver")
    found = run_with_model(run, "eval/llama", work, 2)
    assert next(found) != os.getpid()
    assert [next(found), next(found)] == [0, 1]
    assert next(found) == (True, "tiny", sorted(run.resolved.steps))
    assert next(found) == {"CPU": 2.0}
    assert next(found) == "of the driver", "what a gated model or a server needs travels with the task"
    with pytest.raises(FileNotFoundError, match=r"^no weights at /nowhere$"):
        next(found)
    deaths = tmp_path / "deaths"
    deaths.mkdir()
    assert list(run_with_model(run, "eval/llama", die_twice, deaths)) == [2]
    large = open_tiny(tiny_config, Path(), "eval.cpus_per_worker=64")
    with pytest.raises(ValueError, match=r"eval/llama asks for 64 CPUs and 0 GPUs per worker"):
        next(run_with_model(large, "eval/llama", work, 0))


@pytest.mark.slow
def test_the_driver_of_an_evaluation_on_ray_loads_no_model(
    tiny_config: Path, undisturbed_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may be a head node of a few gigabytes. What Ray would call elsewhere is called here, and known by that."""
    run = Path(shutil.copytree(undisturbed_run, tmp_path / "run"))
    shutil.rmtree(run / "eval")
    tasks: list[str] = []
    is_in_task = False

    def call(what: str, function: Callable[..., Iterator[object]], arguments: tuple, **_: object) -> Iterator[object]:
        nonlocal is_in_task
        tasks.append(what)
        is_in_task = True
        values = list(function(0, *arguments))
        is_in_task = False
        yield from values

    load = AutoModelForCausalLM.from_pretrained
    num_loaded = 0

    def load_in_task(*arguments: object, **settings: object) -> object:
        nonlocal num_loaded
        assert is_in_task, "the driver loads a model"
        num_loaded += 1
        return load(*arguments, **settings)

    monkeypatch.setattr("pipeline.engine.ray_task.run_task", call)
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", load_in_task)
    done = ptafuse("eval", str(tiny_config), "--run", str(run), "--set", "baselines.ensemble=true")
    assert tasks == ["eval/llama", "eval/neox", "eval/ensemble", "eval/fused"]
    assert num_loaded > len(tasks), "the ensemble loads several"
    assert "eval/fused: " in done.stdout


@pytest.mark.slow
@pytest.mark.ray
def test_evaluation_on_ray_gives_the_figures_of_one_process(
    tiny_config: Path, undisturbed_run: Path, tmp_path: Path
) -> None:
    run = Path(shutil.copytree(undisturbed_run, tmp_path / "run"))
    shutil.rmtree(run / "eval")
    done = ptafuse_process("eval", str(tiny_config), "--run", str(run))
    assert "eval/fused: " in done.stdout
    results = {path.relative_to(undisturbed_run) for path in undisturbed_run.glob("eval/**/*.json")}
    assert len(results) == 3
    for result in results:
        found, expected = (json.loads((folder / result).read_text()) for folder in (run, undisturbed_run))
        assert found["bits_per_byte"] == pytest.approx(expected["bits_per_byte"], rel=1e-6)
        assert [part["doc_id"] for part in found["documents"]] == [part["doc_id"] for part in expected["documents"]]
        assert found["settings"] == expected["settings"]
