"""``make gpu-check`` at toy size on the CPU, what its lines say, and that it sees what is broken."""

import io
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from types import ModuleType

import pytest
import torch

from tests.gpu import smoke
from tests.gpu.report import Report, Section, Setup, UnavailableError, run_sections
from tests.gpu.sizes import SIZES

NAMES = [section.name for section in smoke.SECTIONS]
TOY = SIZES["toy"]


def run_smoke(*arguments: str) -> tuple[int, list[dict]]:
    """The command as a user calls it: its exit status and lines."""
    command = [sys.executable, "-m", "tests.gpu.smoke", *arguments]
    done = subprocess.run(
        command, check=False, stdout=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    return done.returncode, [json.loads(line) for line in done.stdout.splitlines()]


def run_here(setup: Setup, *sections: Section, strict: bool = False, seconds: float = 100) -> tuple[Report, list[dict]]:
    """Sections in this process."""
    stream = io.StringIO()
    report = Report(stream, with_speed=setup.is_fast, strict=strict)
    run_sections(sections, report, setup, total_seconds=seconds)
    return report, [json.loads(line) for line in stream.getvalue().splitlines()]


def section_of(name: str) -> Section:
    return next(section for section in smoke.SECTIONS if section.name == name)


def missed(lines: list[dict]) -> list[str]:
    return [line["figure"] for line in lines if line["ok"] is False]


@pytest.fixture
def setup(tmp_path) -> Setup:
    return Setup(TOY, "cpu", tmp_path)


@pytest.fixture
def make_section(monkeypatch) -> Callable[..., Section]:
    """Make a section of a function."""

    def make(name: str, run: Callable[[Report, Setup], None], cap_seconds: float = 10) -> Section:
        module = ModuleType(f"gpu_check_{name}")
        setattr(module, f"run_{name}", run)
        monkeypatch.setitem(sys.modules, module.__name__, module)
        return Section(name, module.__name__, cap_seconds)

    return make


@pytest.mark.slow
def test_all_sections_pass_at_toy_size_on_the_cpu():
    status, lines = run_smoke("--size", "toy", "--device", "cpu")
    assert [line for line in lines if line["ok"] is False] == []
    assert status == 0
    assert all(list(line) == ["section", "figure", "value", "limit", "ok"] for line in lines)
    assert list(dict.fromkeys(line["section"] for line in lines)) == NAMES
    held = {line["section"] for line in lines if line["ok"]}
    assert held == set(NAMES) - {"environment", "reader"}  # these two measure speed alone
    # On a CPU no figure of speed or of memory has a limit.
    speeds = ("_per_s", "tflops", "_mfu", "of_body", "of_estimate", "of_products", "of_dense", "train_step")
    fast = [line for line in lines if line["figure"].endswith(speeds)]
    assert len(fast) > 20
    assert {line["limit"] for line in fast} == {None}


@pytest.mark.slow
@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU here")
def test_all_sections_pass_at_toy_size_on_a_gpu():
    status, lines = run_smoke("--size", "toy", "--device", "cuda")
    assert missed(lines) == []
    assert status == 0


@pytest.mark.parametrize(
    ("value", "limit", "ok"),
    [
        (1.0, "<= 1", True),
        (1.1, "<= 1", False),
        (0.9, ">= 0.9", True),
        (0.8, ">= 0.9", False),
        (1.15, "0.85 to 1.15", True),
        (0.8, "0.85 to 1.15", False),
        (1.2, "0.85 to 1.15", False),
        (float("nan"), "<= 1", False),
        (float("nan"), "0.85 to 1.15", False),
        ("unknown", ">= 0", False),
        (None, ">= 0", False),
        (7, None, None),
    ],
)
def test_a_value_is_held_against_its_limit(value, limit, ok):
    stream = io.StringIO()
    report = Report(stream, with_speed=True)
    report.add_speed("figure", value, limit)
    assert json.loads(stream.getvalue())["ok"] is ok
    assert report.failed is (ok is False)


def test_limits_of_speed_are_for_the_full_size_on_a_gpu(tmp_path):
    assert not Setup(TOY, "cpu", tmp_path).is_fast
    assert not Setup(TOY, "cuda", tmp_path).is_fast
    assert Setup(SIZES["full"], "cuda", tmp_path).is_fast
    report = Report(io.StringIO(), with_speed=False)
    report.add_speed("slow", 0.1, ">= 1")
    assert not report.failed
    report.add("wrong", 0.1, ">= 1")
    assert report.failed


def test_a_section_that_fails_does_not_stop_the_next(setup, make_section):
    def fails(report, _):
        report.add("before", 1.0)
        raise ValueError("first line\nsecond line")

    report, lines = run_here(
        setup, make_section("fails", fails), make_section("works", lambda report, _: report.add("after", 2.0, ">= 1"))
    )
    assert report.failed
    assert missed(lines) == ["error"]
    (error,) = [line for line in lines if line["figure"] == "error"]
    assert error["value"].startswith("ValueError: first line (test_smoke.py:")
    assert ("works", "after", True) in [(line["section"], line["figure"], line["ok"]) for line in lines]


def test_checks_that_cannot_run_are_reported_and_fail_only_if_strict(setup, make_section):
    def lacks_gpu(*_):
        raise UnavailableError("it needs two GPUs")

    def lacks_package(*_):
        import package_that_nobody_has  # noqa: F401

    sections = make_section("gpu", lacks_gpu), make_section("package", lacks_package)
    report, lines = run_here(setup, *sections)
    assert not report.failed
    said = [line["value"] for line in lines if line["figure"] == "section"]
    assert said == ["not run: it needs two GPUs", "not run: the package package_that_nobody_has is not installed"]
    report, lines = run_here(setup, *sections, strict=True)
    assert report.failed
    assert missed(lines) == ["section", "section"]


def test_a_missing_module_of_this_project_is_a_failure(setup):
    report, lines = run_here(setup, Section("gone", "tests.gpu.gone", 10))
    assert report.failed
    assert missed(lines) == ["error"]


def test_a_section_that_takes_too_long_is_stopped(setup, make_section):
    def sleeps(*_):
        for _ in range(200):
            time.sleep(0.1)

    started = time.monotonic()
    report, lines = run_here(setup, make_section("sleeps", sleeps, 0.3), make_section("next", lambda *_: None))
    assert time.monotonic() - started < 10
    assert report.failed
    assert "TimeCapError" in next(line["value"] for line in lines if line["figure"] == "error")
    assert lines[-1]["section"] == "next"


def test_sections_for_which_no_time_is_left_are_named(setup, make_section):
    sections = make_section("first", lambda *_: time.sleep(0.3)), make_section("second", lambda *_: None)
    report, lines = run_here(setup, *sections, seconds=0.2)
    assert report.failed
    assert [line["section"] for line in lines if line["ok"] is False] == ["first", "second"]
    assert "used up" in lines[-1]["value"]


def test_each_section_can_be_imported_and_is_named_as_its_function():
    from importlib import import_module

    for section in smoke.SECTIONS:
        assert callable(getattr(import_module(section.module), f"run_{section.name}"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--device", "cpu"], "choose --size toy"),
        (["--only", "everything"], "invalid choice: 'everything'"),
        pytest.param(
            [],
            "torch sees no GPU here",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU"),
        ),
    ],
)
def test_what_cannot_be_meant_is_refused_before_anything_runs(arguments, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        smoke.main(arguments)
    assert stopped.value.code == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.out == ""


@pytest.fixture
def llama_alone(setup) -> Setup:
    setup.size = replace(TOY, exact_shapes={"llama": TOY.exact_shapes["llama"]})
    return setup


def test_a_top_k_with_a_wrong_id_is_detected(llama_alone, monkeypatch):
    from stages.logits.backends import transformers

    original = transformers.topk_logprobs

    def shifted(*arguments, **settings):
        top = original(*arguments, **settings)
        top.ids[0, 0] += 1
        return top

    monkeypatch.setattr(transformers, "topk_logprobs", shifted)
    _, lines = run_here(llama_alone, section_of("exactness"))
    assert missed(lines) == ["llama_top10_same_float32"]


def test_a_wrong_gradient_is_detected(llama_alone, monkeypatch):
    from train.objective import loss

    original = loss._of_logits
    monkeypatch.setattr(loss, "_of_logits", lambda *arguments: original(*arguments) * 1.001)
    _, lines = run_here(llama_alone, section_of("exactness"))
    assert len(missed(lines)) == 4
    assert all("_gradient_difference_" in figure for figure in missed(lines))


def test_documents_that_see_each_other_are_seen(setup, monkeypatch):
    from tests.gpu import isolation

    original = isolation.collate

    def joined(blocks, *, flatten=False):
        batch = original(blocks, flatten=flatten)
        return replace(batch, position_ids=torch.arange(batch.ids.shape[1]).expand_as(batch.ids))

    monkeypatch.setattr(isolation, "collate", joined)
    _, lines = run_here(setup, section_of("isolation"))
    assert {"block_mask_state_difference", "flattened_block_mask_state_difference"} <= set(missed(lines))


@pytest.mark.slow
def test_an_optimizer_that_is_not_restored_is_seen(setup, monkeypatch):
    from train.checkpoints import checkpoint

    original = checkpoint.load

    def without_optimizer(tensors, **arguments):
        original({"model": tensors["model"]}, **arguments)

    monkeypatch.setattr(checkpoint, "load", without_optimizer)
    _, lines = run_here(setup, section_of("resume"))
    assert "weights_that_differ_eager" in missed(lines)
    assert "error" not in missed(lines)
