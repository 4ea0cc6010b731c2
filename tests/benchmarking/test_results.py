import json
import pathlib

import pytest

from benchmarking.results import (
    Bar,
    append_rows,
    format_estimate,
    from_json,
    make_row,
    markdown_table,
    read_rows,
    to_json,
    unit_of,
)
from benchmarking.statistics import estimate


def make_example(ratios: list[float], bound: float = 1.0):
    return make_row(
        "loader_epoch",
        "threaded at 100 ms",
        {"batch_size": 64, "num_fetch_workers": None, "latency_s": 0.1},
        {"ratio": ratios, "ours_images_per_s": [610.0, 620.0, 600.0]},
        Bar(figure="ratio", bound=bound),
    )


def test_a_row_survives_the_way_through_a_file(tmp_path: pathlib.Path) -> None:
    row = make_example([1.02, 1.05, 1.04])
    path = tmp_path / "runs" / "results.jsonl"

    append_rows(path, [row])
    append_rows(path, [row])

    assert read_rows(path) == [row, row]


def test_a_row_carries_machine_versions_commit_and_date() -> None:
    document = json.loads(to_json(make_example([1.0])))

    assert document["environment"]["machine"]["num_cores"] >= 1
    assert set(document["environment"]["versions"]) >= {"python", "torch", "obstore", "pillow"}
    assert document["environment"]["date"].endswith("+00:00")
    assert document["environment"]["commit"]


def test_the_units_stand_in_the_file() -> None:
    document = json.loads(to_json(make_example([1.0])))

    assert document["figures"]["ours_images_per_s"]["unit"] == "images/s"


def test_a_figure_without_a_unit_in_its_name_is_refused() -> None:
    with pytest.raises(ValueError, match="'speed': its name ends in no unit"):
        make_row("loader_epoch", "x", {}, {"speed": 1.0})


def test_a_rate_is_not_taken_for_seconds() -> None:
    assert unit_of("ours_images_per_s") == "images/s"
    assert unit_of("first_batch_s") == "s"
    assert unit_of("client_cpu_ms_per_image") == "ms CPU/image"


def test_a_bar_about_a_figure_that_is_not_there_is_refused() -> None:
    with pytest.raises(ValueError, match="got the figure 'ratio'"):
        make_row("index_load", "x", {}, {"load_s": 0.1}, Bar(figure="ratio", bound=1.0))


@pytest.mark.parametrize(
    ("ratios", "verdict"),
    [
        ([1.1, 1.2, 1.3], "reached"),
        ([0.9, 1.2, 1.3], "reached, within noise"),
        ([0.8, 0.9, 1.1], "not reached, within noise"),
        ([0.7, 0.8, 0.9], "NOT REACHED"),
    ],
)
def test_the_verdict_tells_noise_from_certainty(ratios: list[float], verdict: str) -> None:
    assert make_example(ratios).verdict == verdict


def test_a_bar_can_be_an_upper_bound() -> None:
    bar = Bar(figure="load_s", bound=0.2, direction="at most")

    assert make_row("index_load", "x", {}, {"load_s": 0.1}, bar).verdict == "reached"
    assert make_row("index_load", "x", {}, {"load_s": 0.3}, bar).verdict == "NOT REACHED"


def test_the_table_shows_median_interval_bar_and_verdict() -> None:
    table = markdown_table([make_example([1.02, 1.05, 1.04])])

    assert "| ratio 1.04 [1.02, 1.05] | ≥ 1 | reached |" in table
    assert "ours_images_per_s 610 [600, 620]" in table


def test_a_value_that_was_measured_once_shows_no_interval() -> None:
    assert format_estimate(estimate(0.1234)) == "0.123"


def test_small_and_large_figures_show_three_digits_that_count() -> None:
    assert format_estimate(estimate([0.000123, 0.000125, 0.0001])) == (
        "0.000123 [0.000100, 0.000125]"
    )
    assert format_estimate(estimate([9740.4, 6071.2, 10131.0])) == "9740 [6071, 10131]"


def test_a_line_that_is_no_row_is_named() -> None:
    with pytest.raises(ValueError, match="is no row"):
        from_json('{"scenario": "loader_epoch"}')
