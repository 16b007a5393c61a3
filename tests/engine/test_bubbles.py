"""What is said of workers that wait while steps are in flight."""

from r1_cluster.engine.bubbles import SAMPLES, Bubbles


def test_only_time_with_a_step_in_flight_counts():
    bubbles = Bubbles()
    bubbles.note("a", 1.0, now=0.0)
    assert bubbles.of("a") is None
    bubbles.begin(10.0)
    bubbles.begin(11.0)  # a second one: the first is in flight still
    bubbles.note("a", 2.5, now=12.0)
    assert bubbles.of("a") == 0.25
    bubbles.end(14.0)
    bubbles.end(15.0)
    bubbles.note("a", 2.5, now=60.0)
    assert bubbles.of("a") == 0.625
    bubbles.note("a", 2.5, now=90.0)
    assert bubbles.of("a") == 0.625


def test_the_window_slides():
    bubbles = Bubbles()
    bubbles.begin(0.0)
    for second in range(SAMPLES + 11):
        bubbles.note("a", float(min(second, 10)), now=float(second))
        bubbles.note("b", float(second), now=float(second))
    assert bubbles.of("a") == 1.0
    assert bubbles.of("b") == 0.0


def test_a_successor_begins_anew():
    bubbles = Bubbles()
    bubbles.begin(0.0)
    bubbles.note("a", 5.0, now=5.0)
    bubbles.note("a", 10.0, now=10.0)
    assert bubbles.of("a") == 0.0
    bubbles.note("a", 0.5, now=12.0)
    assert bubbles.of("a") is None
    bubbles.note("a", 1.0, now=14.0)
    assert bubbles.of("a") == 0.75


def test_a_worker_that_was_busy_with_more_than_steps_in_flight_has_no_bubble():
    bubbles = Bubbles()
    bubbles.begin(0.0)
    bubbles.note("a", 0.0, now=0.0)
    bubbles.note("a", 3.0, now=2.0)
    assert bubbles.of("a") == 0.0
