"""The structure of the code: no circles, and nothing imports upwards."""

import tomllib
from pathlib import Path

from pipeline.run.stage_table import SHARDED_STAGES
from tests.structure.imports import circles, declared_layers, floors, folder_graph, import_graph, upward_imports

ROOT = Path(__file__).parents[2]
GRAPH = import_graph(ROOT, ("pipeline", "stages", "train"))


def graph(**imports: str) -> dict[str, frozenset[str]]:
    return {name: frozenset(imported.split()) for name, imported in imports.items()}


def test_no_files_import_each_other_in_a_circle() -> None:
    assert circles(GRAPH) == []


def test_no_folders_import_each_other_in_a_circle() -> None:
    containers = {module.rpartition(".")[0] for module in GRAPH} - {""}
    assert {container: found for container in containers if (found := circles(folder_graph(GRAPH, container)))} == {}


def test_nothing_imports_against_the_declared_layers() -> None:
    layers = declared_layers(ROOT / "pyproject.toml")
    assert {"pipeline", "stages", "stages.align", "train"} <= layers.keys()
    assert {name: upward_imports(folder_graph(GRAPH, name), declared) for name, declared in layers.items()} == {
        name: [] for name in layers
    }


def test_contracts_that_list_the_stages_list_all_of_them() -> None:
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    modules = {f"stages.{spec.name}" for spec in SHARDED_STAGES}
    listed = [
        set(contract[key])
        for contract in contracts
        for key in ("source_modules", "forbidden_modules")
        if modules & set(contract.get(key, ()))
    ]
    assert listed == [modules, modules]


def test_a_floor_is_one_above_the_highest_import_and_a_circle_shares_one() -> None:
    assert floors(graph(a="b d", b="c", c="", d="e", e="d c")) == {"a": 3, "b": 2, "c": 1, "d": 2, "e": 2}


def test_a_circle_is_found_through_several_files() -> None:
    assert circles(graph(a="b", b="c", c="a d", d="")) == [("a", "b", "c")]


def test_an_import_upwards_or_within_a_layer_is_found() -> None:
    layers = [frozenset({"top"}), frozenset({"left", "right"}), frozenset({"bottom"})]
    found = upward_imports(graph(top="left", left="right", right="bottom", bottom="top"), layers)
    assert found == [("bottom", "top"), ("left", "right")]


def test_imports_inside_functions_and_of_submodules_count(tmp_path: Path) -> None:
    package = tmp_path / "package"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "low.py").write_text("VALUE = 1\n")
    (package / "high.py").write_text("def late():\n    from package import low\n    return low.VALUE\n")
    assert import_graph(tmp_path, ("package",))["package.high"] == {"package.low"}
