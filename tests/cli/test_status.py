"""What `r1-cluster status` shows of an engine, and of links."""

from r1_cluster.cli.status import _show, _show_traffic

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
    lines = capsys.readouterr().out.splitlines()
    titles, stage, spare = lines[
        (first := next(i for i, line in enumerate(lines) if "bubble" in line)) : first + 3
    ]
    end = titles.index("bubble") + len("bubble")
    assert stage[:end].endswith("  25 %")
    assert "%" not in spare


def test_each_data_rank_is_shown_where_there_are_several(capsys):
    _show(ENGINE | {"data_ranks": [{"running": 2, "pages_used": 4}]})
    assert "data ranks" not in capsys.readouterr().out
    _show(ENGINE | {"data_ranks": [{"running": 2, "pages_used": 3}, {"running": 1, "pages_used": 1}]})
    assert "  data ranks: 2 running in 3 pages, 1 running in 1 pages\n" in capsys.readouterr().out


def counted(sent, received):
    keys = ("sent_messages", "sent_bytes", "received_messages", "received_bytes")
    return dict(zip(keys, (*sent, *received)))


def test_traffic_by_kind_of_peer_fits_80_columns(capsys):
    large = (123_456_789, 987_600_000_000_000)
    _show_traffic(
        [
            {"name": "stage-0-rank-1", "traffic": {}, "waited_s": 0.0},
            {
                "name": "router-0",
                "waited_s": 1234.56,
                "traffic": {
                    "stage-0": counted(large, large),
                    "experts-10": counted((3, 1_000), (30, 5_000)),
                    "experts-2": counted((4, 1_100), (40, 6_000)),
                },
            },
            {"name": "experts-10-copy-1", "state": "silent"},
        ]
    )
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    assert [line.split() for line in lines] == [
        ["links", "of", "to", "sent", "received", "waited"],
        ["router-0", "experts", "7", "2.1", "kB", "70", "11.0", "kB", "1234.56", "s"],
        ["router-0", "stage", "123456789", "987.6", "TB", "123456789", "987.6", "TB"],
    ]
