"""All files of infra/ name one Ray, one Python and the images that the Dockerfiles make."""

import re
from pathlib import Path
from typing import Any

import yaml

from tests.tiny_run import REPOSITORY

IMAGES = {"REGISTRY/ptafuse-cpu:TAG", "REGISTRY/ptafuse-gpu:TAG"}


def pinned(name: str) -> str:
    """Return the version of a package in requirements.txt."""
    found = re.search(rf"^{name}==(\S+)$", (REPOSITORY / "requirements.txt").read_text(), re.MULTILINE)
    assert found
    return found[1]


def values(node: Any, key: str) -> list[Any]:
    """Return every value under a key, anywhere in a YAML document."""
    if isinstance(node, list):
        return [value for item in node for value in values(item, key)]
    if not isinstance(node, dict):
        return []
    own = [value for name, value in node.items() if name == key]
    return own + [value for child in node.values() for value in values(child, key)]


def test_kuberay_names_the_pinned_ray(infra: Path) -> None:
    for name in ("raycluster", "rayjob"):
        document = yaml.safe_load((infra / "kuberay" / f"{name}.yaml").read_text())
        assert values(document, "rayVersion") == [pinned("ray")]
        assert set(values(document, "image")) == IMAGES


def test_both_images_take_python_and_ray_from_one_place(infra: Path) -> None:
    texts = [(infra / "docker" / f"{name}.Dockerfile").read_text() for name in ("cpu", "gpu")]
    versions = {re.search(r"^ARG PYTHON_VERSION=(3\.11\.\d+)$", text, re.MULTILINE)[1] for text in texts}
    assert len(versions) == 1
    assert "--requirement requirements.txt" in texts[0]
    constraint = re.search(r"grep -E '\^\(([a-z0-9|]+)\)=='", texts[1])
    assert constraint
    shared = constraint[1].split("|")
    assert {"ray", "torch", "pyarrow"} <= set(shared)
    assert all(pinned(name) for name in shared), "a constraint that matches no line would be lost"


def test_the_head_s_image_has_what_ray_s_launcher_runs_in_it(infra: Path) -> None:
    text = (infra / "docker" / "cpu.Dockerfile").read_text()
    [installed] = re.findall(r"apt-get install --yes --no-install-recommends (.*?) \\\n", text)
    assert {"openssh-client", "rsync", "sudo", "tmux", "wget"} == set(installed.split())
    version = re.search(r"^ARG BOTO3_VERSION=(\S+)$", text, re.MULTILINE)
    assert version
    assert version[1] == pinned("botocore"), "requirements.txt pins the botocore that boto3 needs"
    assert "rsync" in (infra / "docker" / "gpu.Dockerfile").read_text()


def test_flash_attention_is_built_for_named_architectures_with_bounded_jobs(infra: Path) -> None:
    """Its setup.py reads FLASH_ATTN_CUDA_ARCHS alone, and starts MAX_JOBS compilers of NVCC_THREADS threads."""
    text = (infra / "docker" / "gpu.Dockerfile").read_text()
    assert "TORCH_CUDA_ARCH_LIST=" not in text
    settings = dict(
        re.findall(r'^ARG (FLASH_ATTN_CUDA_ARCHS|MAX_JOBS|NVCC_THREADS)="?([^"\n]+)"?$', text, re.MULTILINE)
    )
    assert settings["FLASH_ATTN_CUDA_ARCHS"] == "80;90"
    assert int(settings["MAX_JOBS"]) * int(settings["NVCC_THREADS"]) <= 8
    [build] = re.findall(r"^    && FLASH_ATTENTION_FORCE_BUILD=TRUE (.*?)flash-attn==", text, re.MULTILINE | re.DOTALL)
    for name in settings:
        assert f"{name}=" in build


def test_every_copied_path_is_let_through_by_the_ignore_file(infra: Path) -> None:
    for name in ("cpu", "gpu"):
        text = (infra / "docker" / f"{name}.Dockerfile").read_text()
        ignore = (infra / "docker" / f"{name}.Dockerfile.dockerignore").read_text().splitlines()
        copied = {
            path
            for line in re.findall(r"^COPY (.*)$", text, re.MULTILINE)
            for path in line.split()[:-1]
            if not path.startswith("--")
        }
        assert {f"!{path}" for path in copied} == {line for line in ignore if line.startswith("!")}
        assert all((REPOSITORY / path).exists() for path in copied)


def test_aws_names_the_images(infra: Path) -> None:
    document = yaml.safe_load((infra / "aws" / "cluster.yaml").read_text())
    assert {*values(document, "worker_image"), *filter(None, values(document["docker"], "image"))} == IMAGES
