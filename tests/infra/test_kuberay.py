"""KubeRay manifests: pods against Kubernetes' schemas, the rest against the rules that KubeRay's operator checks."""

import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

kubernetes_validate = pytest.importorskip("kubernetes_validate", reason="install requirements-dev.txt")

KUBERNETES = "1.30"


def load(infra: Path, name: str) -> dict[str, Any]:
    return yaml.safe_load((infra / "kuberay" / f"{name}.yaml").read_text())


@pytest.fixture
def spec(infra: Path) -> dict[str, Any]:
    """Provide the cluster's specification."""
    return load(infra, "raycluster")["spec"]


def groups(spec: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {"head": spec["headGroupSpec"], **{group["groupName"]: group for group in spec["workerGroupSpecs"]}}


def test_job_and_cluster_describe_the_same_cluster(infra: Path, spec: dict[str, Any]) -> None:
    assert load(infra, "rayjob")["spec"]["rayClusterSpec"] == spec


def test_every_pod_fits_kubernetes_schema(spec: dict[str, Any]) -> None:
    assert len(groups(spec)) >= 2, "a head, and workers"
    for name, group in groups(spec).items():
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name}, "spec": group["template"]["spec"]}
        kubernetes_validate.validate(pod, KUBERNETES, strict=True)


def test_misspelt_field_of_a_pod_would_be_noticed(spec: dict[str, Any]) -> None:
    pod_spec = {**spec["headGroupSpec"]["template"]["spec"], "tolerance": []}
    pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "x"}, "spec": pod_spec}
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(pod, KUBERNETES, strict=True)


def test_head_gives_no_cpus_to_work(spec: dict[str, Any]) -> None:
    assert spec["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"


def test_cpu_and_gpu_workers_scale_apart_on_spot_nodes(spec: dict[str, Any]) -> None:
    assert spec["enableInTreeAutoscaling"] is True
    workers = {name: group for name, group in groups(spec).items() if name != "head"}
    assert set(workers) == {"cpu-spot", "gpu-spot"}
    for name, group in workers.items():
        pod = group["template"]["spec"]
        assert (group["minReplicas"], group["maxReplicas"] > 0) == (0, True)
        assert pod["nodeSelector"] == {"ptafuse/pool": name}
        assert "ptafuse/spot" in [toleration["key"] for toleration in pod["tolerations"]]
        gpus = pod["containers"][0]["resources"]["limits"].get("nvidia.com/gpu", "0")
        assert (int(gpus) > 0) == (name == "gpu-spot")
    assert "tolerations" not in spec["headGroupSpec"]["template"]["spec"], "the head is on no spot node"


def test_every_node_mounts_the_shared_disk(spec: dict[str, Any]) -> None:
    for group in groups(spec).values():
        pod = group["template"]["spec"]
        mounts = {mount["mountPath"]: mount["name"] for mount in pod["containers"][0]["volumeMounts"]}
        volumes = {volume["name"]: volume for volume in pod["volumes"]}
        assert "persistentVolumeClaim" in volumes[mounts["/shared"]]


def test_every_ray_start_parameter_is_a_string(spec: dict[str, Any]) -> None:
    for group in groups(spec).values():
        assert all(isinstance(value, str) for value in group["rayStartParams"].values())


def test_deletion_rules_are_ones_that_the_operator_accepts(infra: Path) -> None:
    job = load(infra, "rayjob")["spec"]
    rules = job["deletionStrategy"]["deletionRules"]
    assert {rule["condition"].get("jobStatus", "deployment") for rule in rules} == {"SUCCEEDED", "FAILED", "deployment"}
    assert all(len({"jobStatus", "jobDeploymentStatus"} & set(rule["condition"])) == 1 for rule in rules)
    assert "DeleteWorkers" not in [rule["policy"] for rule in rules], "refused together with autoscaling"
    assert "shutdownAfterJobFinishes" not in job
    assert "ttlSecondsAfterFinished" not in job
    succeeded = [rule for rule in rules if rule["condition"].get("jobStatus") == "SUCCEEDED"]
    times = {rule["policy"]: rule["condition"]["ttlSeconds"] for rule in succeeded}
    assert times["DeleteCluster"] < times["DeleteSelf"], "the operator asks for this order"


def test_job_runs_a_shipped_configuration_to_its_end(infra: Path) -> None:
    from pipeline.settings.load import load_config

    words = load(infra, "rayjob")["spec"]["entrypoint"].split()
    assert words[:2] == ["ptafuse", "eval"]
    assert load_config(words[2]).name == "llama2-7b"
    assert words[3] == "--run"
    assert words[4].startswith("/shared/"), "what every node mounts"
    assert words[5:] == ["--upstream"]


def test_every_pod_may_write_the_shared_volume(infra: Path, spec: dict[str, Any]) -> None:
    """A fresh claim belongs to root."""
    for name in ("cpu", "gpu"):
        text = (infra / "docker" / f"{name}.Dockerfile").read_text()
        assert "useradd --create-home --uid 1000 ray" in text
        assert "USER 1000" in text
    for group in groups(spec).values():
        assert group["template"]["spec"]["securityContext"]["fsGroup"] == 1000


def test_a_gpu_pod_is_a_whole_machine_with_the_cpus_that_the_shipped_run_needs(spec: dict[str, Any]) -> None:
    from pipeline.settings.load import load_config

    pod = groups(spec)["gpu-spot"]["template"]["spec"]
    limits = pod["containers"][0]["resources"]["limits"]
    config = load_config("llama2_7b")
    assert int(limits["nvidia.com/gpu"]) == config.train.num_workers == 8
    assert int(limits["cpu"]) >= 8 * max(config.train.cpus_per_worker, config.logits.cpus_per_worker)
    memory = {volume["name"]: volume.get("emptyDir", {}) for volume in pod["volumes"]}["shared-memory"]
    assert memory == {"medium": "Memory", "sizeLimit": "64Gi"}


def test_a_gpu_pod_that_is_deleted_has_the_time_of_a_checkpoint(spec: dict[str, Any]) -> None:
    pod = groups(spec)["gpu-spot"]["template"]["spec"]
    [shell, _, script] = pod["containers"][0]["lifecycle"]["preStop"]["exec"]["command"]
    assert shell == "/bin/bash"
    deadline = int(re.search(r"--deadline-remaining-seconds (\d+)", script)[1])
    assert deadline < pod["terminationGracePeriodSeconds"] == 300


@pytest.mark.parametrize("is_busy", [True, False])
def test_the_hook_drains_the_node_and_waits_for_its_raylet(
    spec: dict[str, Any], tmp_path: Path, *, is_busy: bool
) -> None:
    from ray.scripts.scripts import drain_node

    [shell, flag, script] = groups(spec)["gpu-spot"]["template"]["spec"]["containers"][0]["lifecycle"]["preStop"][
        "exec"
    ]["command"]
    (tmp_path / "ray").write_text(f'#!/bin/bash\nprintf "%s\\n" "$@" > {tmp_path}/arguments\n')
    (tmp_path / "sleep").write_text(  # the raylet is gone after the third second
        f"#!/bin/bash\ncd {tmp_path}; echo x >> slept\n(($(wc -l < slept) < 3)) || echo other > proc/7/comm\n"
    )
    for name in ("ray", "sleep"):
        (tmp_path / name).chmod(0o755)
    (tmp_path / "proc" / "7").mkdir(parents=True)
    (tmp_path / "proc" / "7" / "comm").write_text("raylet\n" if is_busy else "bash\n")
    script = script.replace("/proc/", f"{tmp_path}/proc/")
    subprocess.run([shell, flag, script], check=True, env={"PATH": f"{tmp_path}:/usr/bin:/bin"}, timeout=60)
    arguments = (tmp_path / "arguments").read_text().splitlines()
    assert arguments[0] == "drain-node"
    context = drain_node.make_context("drain-node", arguments[1:])
    assert context.params["reason"] == "DRAIN_NODE_REASON_PREEMPTION", "click refuses a name that Ray does not know"
    slept = (tmp_path / "slept").read_text().count("x") if (tmp_path / "slept").exists() else 0
    assert slept == (3 if is_busy else 0)
