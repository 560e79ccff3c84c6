"""Counters go on over deaths and silences of an engine's process."""

from ferry.engines.request import Stats
from ferry.engines.totals import Totals


def test_counters_never_fall_and_gauges_are_those_of_now() -> None:
    totals = Totals()
    assert totals.of(Stats(num_running=2, num_generated_tokens=10), 0) == Stats(num_running=2, num_generated_tokens=10)
    assert totals.of(None, 0) == Stats(num_running=2, num_generated_tokens=10)
    assert totals.of(Stats(num_running=1, num_generated_tokens=15), 0).num_generated_tokens == 15
    assert totals.of(None, 1) == Stats(num_generated_tokens=15)
    assert totals.of(Stats(num_generated_tokens=4), 1).num_generated_tokens == 19
    assert totals.of(Stats(num_generated_tokens=1), 3).num_generated_tokens == 20
