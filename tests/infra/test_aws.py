"""The cluster launcher's file, as Ray itself parses it."""

import copy
import re
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml


@pytest.fixture
def config(infra: Path) -> dict[str, Any]:
    return yaml.safe_load((infra / "aws" / "cluster.yaml").read_text())


def prepared(config: dict[str, Any]) -> dict[str, Any]:
    from ray.autoscaler._private.util import prepare_config, validate_config

    found = prepare_config(copy.deepcopy(config))
    found.setdefault("cluster_synced_files", [])  # `ray up` fills it
    validate_config(found)
    return found


def test_ray_accepts_the_file(config: dict[str, Any]) -> None:
    found = prepared(config)
    assert found["head_node_type"] in found["available_node_types"]
    assert found["available_node_types"]["gpu-spot"]["max_workers"] == 8


def test_a_misspelt_setting_is_noticed(config: dict[str, Any]) -> None:
    config["available_node_types"]["head"]["resource"] = {}
    with pytest.raises(jsonschema.ValidationError):
        prepared(config)


def test_head_gives_no_cpus_to_work(config: dict[str, Any]) -> None:
    assert config["available_node_types"]["head"]["resources"]["CPU"] == 0
    [start] = [command for command in config["head_start_ray_commands"] if "--head" in command]
    assert "--num-cpus=0" in start.split()


def test_workers_are_spot_instances_that_scale_apart_from_zero(config: dict[str, Any]) -> None:
    types = {name: kind for name, kind in config["available_node_types"].items() if name != config["head_node_type"]}
    assert {name: bool(kind["resources"].get("GPU")) for name, kind in types.items()} == {
        "cpu-spot": False,
        "gpu-spot": True,
    }
    for kind in types.values():
        assert kind["min_workers"] == 0
        assert kind["node_config"]["InstanceMarketOptions"] == {"MarketType": "spot"}
    assert config["provider"]["cache_stopped_nodes"] is False
    assert sum(kind["max_workers"] for kind in types.values()) == config["max_workers"]


def test_every_machine_has_an_image_and_an_instance_profile_of_our_own(config: dict[str, Any]) -> None:
    """Ray's default image is Ubuntu 18.04, and its instance profile goes to the head alone."""
    for kind in prepared(config)["available_node_types"].values():
        assert kind["node_config"]["ImageId"] == "AMI"
        assert kind["node_config"]["IamInstanceProfile"] == {"Arn": "INSTANCE_PROFILE"}


def test_every_placeholder_is_filled_in_by_the_commands_of_the_readme(infra: Path) -> None:
    text = (infra / "aws" / "cluster.yaml").read_text()
    readme = (infra / "README.md").read_text()
    for name in ("REGISTRY", "TAG", "FILE_SYSTEM", "AMI", "INSTANCE_PROFILE"):
        assert re.search(rf"\b{name}\b", text)
        assert re.search(rf"s#:?{name}#", readme), f"no sed for {name}"
