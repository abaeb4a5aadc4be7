"""Fault injection for processes that the tests start: Python loads this file at start-up when it is on the path."""

import importlib.abc
import importlib.util
import os
import sys


class _Patch(importlib.abc.MetaPathFinder):
    """Wraps a module right after it was imported."""

    def __init__(self, name, wrap):
        self.name = name
        self.wrap = wrap

    def find_spec(self, name, path=None, target=None):
        if name != self.name:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        load = spec.loader.exec_module

        def exec_module(module):
            load(module)
            self.wrap(module)

        spec.loader.exec_module = exec_module
        return spec


if os.environ.get("PTAFUSE_FAULT"):
    from tests.faults.points import WRAPPED

    sys.meta_path[:0] = [_Patch(name, wrap) for name, wrap in WRAPPED.items()]
