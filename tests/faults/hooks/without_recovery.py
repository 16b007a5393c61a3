"""Switches off what a service does for the day on which something dies, for
`benchmarks/recovery_overhead.py` (see sitecustomize.py).

Off: heartbeats, canaries and the look for what is overdue; the pulse for standbys and ingresses; what the
first stage keeps for the next engine; the question, before every step, whether somebody is missing.
"""

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


ACTS = {f"r1_cluster.engine.{act.__name__}": act for act in (core, pulse, streams, held, recovery)}
