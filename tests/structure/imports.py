"""Read which files import which, and arrange files and folders in floors.

Imports are read as text, those inside functions and under ``TYPE_CHECKING`` included: they tie files together just as
much as those at the top, although import-linter's graph and Python itself treat some of them differently.
"""

import ast
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path

Graph = Mapping[str, frozenset[str]]
"""A file's or a folder's dotted name -> the names that it imports."""


def import_graph(root: Path, packages: Iterable[str]) -> dict[str, frozenset[str]]:
    """Return the imports between the files of some packages.

    Args:
        root: folder of the packages.
        packages: their names.

    Returns:
        Dotted name of each file (a package's ``__init__`` by the package's name) -> the files it imports.
    """
    modules = {_module_name(path, root): path for package in packages for path in (root / package).rglob("*.py")}
    return {name: frozenset(_imports(path, modules) - {name}) for name, path in sorted(modules.items())}


def folder_graph(graph: Graph, container: str) -> dict[str, frozenset[str]]:
    """Return the imports between the direct children (folders and files) of a package.

    Args:
        graph: imports between files.
        container: dotted name of the package.
    """
    found: dict[str, set[str]] = {}
    for module, imported in graph.items():
        child = _child(module, container)
        if child is not None:
            others = {_child(other, container) for other in imported} - {None, child}
            found.setdefault(child, set()).update(other for other in others if other is not None)
    return {child: frozenset(others) for child, others in found.items()}


def circles(graph: Graph) -> list[tuple[str, ...]]:
    """Return the sets of nodes that import each other in a loop (strongly connected components of two nodes or more)."""
    return [component for component in _components(graph) if len(component) > 1]


def floors(graph: Graph) -> dict[str, int]:
    """Return each node's floor, counted from 1: one above the highest of the nodes it imports.

    Nodes of one circle share a floor.
    """
    component_of = {node: component for component in _components(graph) for node in component}
    found: dict[tuple[str, ...], int] = {}

    def floor(component: tuple[str, ...]) -> int:
        if component not in found:
            below = {component_of[other] for node in component for other in graph[node]} - {component}
            found[component] = 1 + max(map(floor, below), default=0)
        return found[component]

    return {node: floor(component) for node, component in component_of.items()}


def upward_imports(graph: Graph, layers: list[frozenset[str]]) -> list[tuple[str, str]]:
    """Return the imports that run from a lower layer to a higher one, or between two members of one layer.

    Args:
        graph: imports between the children of a package.
        layers: the highest first, as import-linter lists them.
    """
    rank = {child: index for index, layer in enumerate(layers) for child in layer}
    return sorted(
        (child, other)
        for child, others in graph.items()
        for other in others
        if child in rank and other in rank and rank[other] <= rank[child]
    )


def declared_layers(pyproject: Path) -> dict[str, list[frozenset[str]]]:
    """Return the layers that import-linter's contracts declare: container -> its layers, the highest first."""
    contracts = tomllib.loads(pyproject.read_text(encoding="utf-8"))["tool"]["importlinter"]["contracts"]
    return {
        container: [frozenset(name.strip() for name in layer.split("|")) for layer in contract["layers"]]
        for contract in contracts
        if contract["type"] == "layers"
        for container in contract.get("containers", [])
    }


def _module_name(path: Path, root: Path) -> str:
    parts = path.relative_to(root).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _child(module: str, container: str) -> str | None:
    """Return the direct child of the container that holds a module, None if none does."""
    prefix = f"{container}."
    return module.removeprefix(prefix).split(".", 1)[0] if module.startswith(prefix) else None


def _imports(path: Path, modules: Mapping[str, Path]) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if alias.name in modules}
        elif isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                submodule = f"{node.module}.{alias.name}"
                found.add(submodule if submodule in modules else node.module)
    return found & modules.keys()


def _components(graph: Graph) -> list[tuple[str, ...]]:
    """Return the strongly connected components (Tarjan 1972); nodes without a circle are components of one."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    components: list[tuple[str, ...]] = []

    def visit(node: str) -> None:
        index[node] = low[node] = len(index)
        stack.append(node)
        for other in sorted(graph[node]):
            if other not in index:
                visit(other)
                low[node] = min(low[node], low[other])
            elif other in stack:
                low[node] = min(low[node], index[other])
        if low[node] == index[node]:
            position = stack.index(node)
            components.append(tuple(sorted(stack[position:])))
            del stack[position:]

    for node in sorted(graph):
        if node not in index:
            visit(node)
    return components
