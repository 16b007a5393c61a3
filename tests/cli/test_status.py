"""What `r1-cluster status` shows of an engine."""

from r1_cluster.cli.status import _show

ENGINE = {
    "engine": "engine-0",
    "layout": "disaggregated",
    "epoch": 3,
    "pid": 11,
    "host": "here",
    "running": 2,
    "waiting": 0,
    "pages_used": 4,
    "pages": 64,
    "tokens": 100,
    "steps": 60,
    "health": {"status": "ready"},
    "recoveries": 0,
    "recovery_log": [],
    "step_ms": None,
    "workers": [
        {"name": "stage-0", "roles": ["stage"], "state": "alive", "bubble": 0.254},
        {"name": "spare-0", "state": "alive", "bubble": None},
    ],
}


def test_the_bubble_of_each_worker_is_shown(capsys):
    _show(ENGINE)
    *_, titles, stage, spare = capsys.readouterr().out.splitlines()
    end = titles.index("bubble") + len("bubble")
    assert stage[:end].endswith("  25 %")
    assert "%" not in spare
