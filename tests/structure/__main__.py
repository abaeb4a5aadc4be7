"""Print the floors of every package: ``python -m tests.structure [FOLDER]``, a checkout of ptafuse, this one by default.

For each package: its children (folders and files) by floor, the children they import, the circles among them, and the
imports that run against the layers which pyproject.toml declares. The last lines sum up the files of the checkout.
"""

import sys
from pathlib import Path

from tests.structure.imports import circles, declared_layers, floors, folder_graph, import_graph, upward_imports

PACKAGES = ("pipeline", "stages", "train")


def main(root: Path) -> None:
    """Print the structure of a checkout."""
    graph = import_graph(root, PACKAGES)
    layers = declared_layers(root / "pyproject.toml")
    containers = sorted({".".join(module.split(".")[:-1]) for module in graph if "." in module})
    for container in containers:
        children = folder_graph(graph, container)
        height = floors(children)
        if len(children) < 2:
            continue
        upward = upward_imports(children, layers[container]) if container in layers else None
        checked = "no layers declared" if upward is None else f"{len(upward)} upward imports"
        loops = circles(children)
        print(f"{container}: {len(children)} rooms, {max(height.values())} floors, {len(loops)} circles, {checked}")
        for floor in sorted(set(height.values()), reverse=True):
            for child in sorted(child for child in children if height[child] == floor):
                imported = ", ".join(sorted(children[child])) or "-"
                print(f"  floor {floor:2}  {child:22} -> {imported}")
        for loop in loops:
            print(f"  circle: {' <-> '.join(loop)}")
        for child, other in upward or ():
            print(f"  upward: {child} -> {other}")
        print()
    loops = circles(graph)
    print(f"files: {len(graph)} in all, {max(floors(graph).values())} floors, {len(loops)} circles")
    for loop in loops:
        print(f"  circle: {' <-> '.join(loop)}")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parents[2])
