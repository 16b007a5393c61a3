"""Changes modules of a service under test when it imports them; the product knows nothing of it.

Python imports this by itself in every process whose PYTHONPATH names this folder. `R1_HOOKS` says which of the
modules beside it has the changes: its `ACTS` are functions of a module, by the module's name.
"""

import importlib.abc
import importlib.util
import os
import sys

ACTS = dict(importlib.import_module(os.environ["R1_HOOKS"]).ACTS)


class Finder(importlib.abc.MetaPathFinder):
    """Finds the modules that are to be changed, by asking everybody else."""

    def find_spec(self, name, path, target=None):
        act = ACTS.pop(name, None)
        if act is None:
            return None
        spec = importlib.util.find_spec(name)
        execute = spec.loader.exec_module

        def exec_module(module):
            execute(module)
            act(module)

        spec.loader.exec_module = exec_module
        return spec


sys.meta_path.insert(0, Finder())
