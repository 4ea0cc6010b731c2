import dataclasses
import math

import pytest

from benchmarking import scenarios
from benchmarking.effort import Effort
from benchmarking.results import from_json, to_json

pytest.importorskip("skimage", reason="the photographs ship with scikit-image")
pytest.importorskip("sklearn", reason="the photographs ship with scikit-learn")

TINY = Effort(repeats=1, seconds=0.0, num_images=10, batch_size=2, is_quick=True)
# The other latencies are the same function with another number.
SAME_AS_5MS = {"30ms", "100ms", "200ms"}
ALL_CASES = [
    (name, case)
    for name in scenarios.NAMES
    for case in scenarios.open_scenario(name).cases
    if name not in ("loader_epoch", "in_flight") or case not in SAME_AS_5MS
]

# The longest, which run by `-m grid`; the others of their scenarios share most of their code.
LONG_CASES = {
    ("in_flight", "5ms"),
    ("outage", "refused"),
    ("outage", "reset"),
    ("shard_write", "memory"),
    ("soak", "fresh"),
    ("store_get", "clients"),
}


@pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")
@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "case"),
    [
        pytest.param(*each, marks=[pytest.mark.grid] if each in LONG_CASES else [])
        for each in ALL_CASES
    ],
    ids=[f"{n}-{c}" for n, c in ALL_CASES],
)
def test_the_scenario_runs_and_its_rows_are_whole(name: str, case: str) -> None:
    scenario = scenarios.open_scenario(name)

    rows = scenario.cases[case](TINY)

    assert rows
    assert {row.scenario for row in rows} == {name}
    assert len({row.case for row in rows}) == len(rows)
    assert any(row.bar is not None for row in rows) == (case in scenario.bars)
    for row in rows:
        assert all(math.isfinite(v) for figure in row.figures.values() for v in figure.values)
        assert from_json(to_json(row)) == row


def test_every_bar_of_the_goals_has_a_case() -> None:
    bars = {(name, case) for name in scenarios.NAMES for case in scenarios.open_scenario(name).bars}

    assert bars >= {
        ("loader_epoch", "5ms"),
        ("loader_epoch", "30ms"),
        ("loader_epoch", "100ms"),
        ("loader_epoch", "200ms"),
        ("loader_epoch", "ram"),
        ("loader_epoch", "local"),
        ("loader_epoch", "plain"),
        ("loader_epoch", "boto3"),
        ("loader_epoch", "vanilla"),
        ("store_get", "loader"),
        ("store_get", "cpu"),
        ("first_batch", "100ms"),
        ("lmdb_read", "cache"),
        ("lmdb_read", "seeks"),
        ("cache_read", "epoch"),
        ("cache_read", "crash"),
        ("index_load", "load"),
        ("index_load", "growth"),
        ("memory", "persistent"),
        ("memory", "fresh"),
        ("faults", "mixed"),
        ("faults", "stalls"),
        ("in_flight", "5ms"),
        ("in_flight", "30ms"),
        ("in_flight", "100ms"),
        ("in_flight", "200ms"),
        ("in_flight", "limited"),
        ("outage", "refused"),
        ("outage", "reset"),
        ("outage", "unavailable"),
        ("outage", "dead"),
        ("soak", "persistent"),
        ("soak", "fresh"),
    }


@pytest.mark.parametrize("name", scenarios.NAMES)
def test_a_scenario_opens_with_a_question_and_its_command(name: str) -> None:
    scenario = scenarios.open_scenario(name)
    module = __import__(f"benchmarking.scenarios.{name}", fromlist=["__doc__"])

    assert scenario.question.endswith("?")
    assert f"python -m benchmarking {name}" in (module.__doc__ or "")


def test_a_scenario_that_is_not_there_is_named() -> None:
    with pytest.raises(ValueError, match="got 'loader', expected one of loader_epoch"):
        scenarios.open_scenario("loader")


@pytest.mark.parametrize("field", ["repeats", "num_images", "batch_size"])
def test_an_effort_of_nothing_is_refused(field: str) -> None:
    with pytest.raises(ValueError, match=f"{field}: got 0"):
        dataclasses.replace(TINY, **{field: 0})
