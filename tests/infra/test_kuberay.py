"""KubeRay manifests: pods against Kubernetes' schemas, the rest against the rules that KubeRay's operator checks."""

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
    """The cluster's specification."""
    return load(infra, "raycluster")["spec"]


def groups(spec: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {"head": spec["headGroupSpec"], **{group["groupName"]: group for group in spec["workerGroupSpecs"]}}


def test_job_and_cluster_describe_the_same_cluster(infra: Path, spec: dict[str, Any]) -> None:
    assert load(infra, "rayjob")["spec"]["rayClusterSpec"] == spec


def test_every_pod_fits_kubernetes_schema(spec: dict[str, Any]) -> None:
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
