"""Python imports this file at its start wherever the folder is on PYTHONPATH: memory that torch hands out unwritten is NaN.

So a number that depends on such memory shows in every process that a test starts, not on one machine in fifty. What
imports no torch does not pay for it: the setting waits until somebody does.
"""

import importlib.util
import sys


class TorchWithFilledMemory:
    """Finds torch as ever, and sets its switch once it is loaded."""

    def find_spec(self, name, path=None, target=None):
        if name != "torch":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        load = spec.loader.exec_module

        def load_and_switch(module):
            load(module)
            module.use_deterministic_algorithms(True, warn_only=True)

        spec.loader.exec_module = load_and_switch
        return spec


sys.meta_path.insert(0, TorchWithFilledMemory())
