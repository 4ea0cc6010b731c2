import os
import pathlib
import signal
import subprocess
import sys

import psutil
import pytest

from benchmarking import demo
from benchmarking.demo import Settings, run_demo
from benchmarking.results import read_rows

pytest.importorskip("skimage", reason="the photographs ship with scikit-image")
pytest.importorskip("sklearn", reason="the photographs ship with scikit-learn")
pytest.importorskip("matplotlib", reason="draws the figure")

REPOSITORY = pathlib.Path(demo.__file__).parents[1]


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_the_demo_trains_compares_and_can_be_repeated(
    tmp_path: pathlib.Path, capfd: pytest.CaptureFixture[str]
) -> None:
    settings = Settings(
        output=tmp_path,
        latency_s=0.002,
        num_train=20,
        num_val=10,
        epochs=1,
        crop_size=32,
        batch_size=4,
        seconds=0.0,
    )
    (tmp_path / "training").mkdir()
    (tmp_path / "training" / "log.jsonl").write_text("left by an earlier run")

    row = run_demo(settings)

    assert read_rows(tmp_path / "results.jsonl") == [row]
    assert row.figures["ratio"].median > 0
    for name in ("demo.png", "train.json", "classes.json", "training/model_best.pth.tar"):
        assert (tmp_path / name).stat().st_size > 0
    said = capfd.readouterr().out
    assert "equal, bit for bit" in said
    assert "The object server is stopped." in said
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert not any(b"test-secret-key" in path.read_bytes() for path in files)
    assert "test-secret-key" not in said


@pytest.mark.slow
def test_ctrl_c_stops_the_server_and_says_so(tmp_path: pathlib.Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "benchmarking.demo", f"--output={tmp_path}"],
        cwd=REPOSITORY,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("[2/6]"):
            break
    children = psutil.Process(process.pid).children(recursive=True)

    os.killpg(process.pid, signal.SIGINT)
    _, complaints = process.communicate(timeout=30)

    assert process.returncode == 130
    assert "interrupted; the object server is stopped" in complaints
    _, alive = psutil.wait_procs(children, timeout=10)
    assert children
    assert not alive
