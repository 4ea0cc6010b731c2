import pathlib

import pytest

from benchmarking import scenarios
from benchmarking.__main__ import main
from benchmarking.results import Bar, read_rows
from benchmarking.scenarios import index_load

pytest.importorskip("skimage", reason="the photographs ship with scikit-image")
pytest.importorskip("sklearn", reason="the photographs ship with scikit-learn")


def test_the_list_names_each_scenario_with_its_question(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list"]) == 0

    said = capsys.readouterr().out
    for name in scenarios.NAMES:
        assert f"{name}: {scenarios.open_scenario(name).question}" in said


def test_a_run_prints_a_table_and_keeps_its_rows(
    tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "results.jsonl"

    status = main(["dataset_item", "--quick", "--images=10", "--repeats=2", f"--output={output}"])

    assert status == 0
    (row,) = read_rows(output)
    assert len(row.figures["decode_cpu_ms_per_image"].values) == 2
    assert "decode_cpu_ms_per_image" in capsys.readouterr().out


def test_bars_leave_a_table_beside_the_rows(tmp_path: pathlib.Path) -> None:
    output = tmp_path / "results.jsonl"

    main(["bars", "--quick", "--only", "load", f"--output={output}"])

    table = output.with_suffix(".md").read_text()
    assert "| index_load | load of 20,000 packed keys |" in table
    assert "| ≤ 0.2 s | reached |" in table


def test_a_bar_that_is_missed_ends_it_with_status_1(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load = ["index_load", "--quick", "--only", "load", f"--output={tmp_path / 'results.jsonl'}"]
    assert main(load) == 0

    bar_at_nothing = Bar(figure="load_s", bound=0.0, direction="at most")
    monkeypatch.setattr(index_load, "Bar", lambda **_: bar_at_nothing)

    assert main(load) == 1


def test_a_case_that_is_not_there_is_named(
    tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["loader_epoch", "--only", "7ms", f"--output={tmp_path / 'results.jsonl'}"])
    told = capsys.readouterr().err
    assert "--only: got '7ms', expected a case of loader_epoch: 5ms" in told
