"""Switches off what a service does for the day on which something dies, for
`benchmarks/recovery_overhead.py`. Python imports this by itself in every process whose PYTHONPATH names this
folder.

Off: heartbeats, canaries and the look for what is overdue; the pulse for standbys and ingresses; what the
first stage keeps for the next engine; the question, before every step, whether somebody is missing.
"""

import importlib.abc
import importlib.util
import sys

NEVER_S = 1e6  # poll counts milliseconds in 32 bits


def core(module):
    module.HEARTBEAT_S = NEVER_S


def pulse(module):
    module.BEAT_S = NEVER_S


def streams(module):
    module.SILENCE_S = NEVER_S


def held(module):
    module.HeldSequences.note = lambda self, plan: None


def recovery(module):
    module.Recovery.under_way = False


SWITCHES = {f"r1_cluster.engine.{act.__name__}": act for act in (core, pulse, streams, held, recovery)}


class Finder(importlib.abc.MetaPathFinder):
    """Finds the modules that are to be changed, by asking everybody else."""

    def find_spec(self, name, path, target=None):
        switch = SWITCHES.pop(name, None)
        if switch is None:
            return None
        spec = importlib.util.find_spec(name)
        execute = spec.loader.exec_module

        def exec_module(module):
            execute(module)
            switch(module)

        spec.loader.exec_module = exec_module
        return spec


sys.meta_path.insert(0, Finder())
