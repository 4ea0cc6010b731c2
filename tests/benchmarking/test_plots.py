import json
import pathlib

import pytest
from PIL import Image

from benchmarking.plots.demo import Epoch, _caption, draw_demo, read_epochs
from benchmarking.plots.latency import draw_latency
from benchmarking.results import Row, make_row
from benchmarking.statistics import paired_ratio

pytest.importorskip("matplotlib", reason="draws the figures")


def make_latency_row(impl: str, latency_s: float, ours_per_s: float) -> Row:
    return make_row(
        "loader_epoch",
        f"{impl}, store at {latency_s * 1e3:g} ms, against torch over RAM",
        {
            "fetch_impl": impl,
            "latency_median_s": latency_s,
            "num_workers": 2,
            "batch_size": 64,
            "mean_image_bytes": 110_000,
            "repeats": 3,
        },
        {
            "ratio": [ours_per_s / 600, ours_per_s / 610, ours_per_s / 590],
            "ours_images_per_s": [ours_per_s - 20, ours_per_s, ours_per_s + 15],
            "torch_images_per_s": [590.0, 600.0, 610.0],
        },
    )


def make_demo_row() -> Row:
    return make_row(
        "demo",
        "ours and torch's",
        {"latency_median_s": 0.1, "num_classes": 10, "num_workers": 2, "batch_size": 32},
        {
            "ratio": 34.0,
            "ram_ratio": 1.0,
            "ours_images_per_s": 600.0,
            "torch_images_per_s": 17.0,
            "ram_images_per_s": 600.0,
        },
    )


def test_the_latency_figure_is_drawn_without_a_screen(tmp_path: pathlib.Path) -> None:
    rows = [
        make_latency_row(impl, latency_s, ours_per_s)
        for impl in ("threaded", "asyncio")
        for latency_s, ours_per_s in [(0.005, 700.0), (0.03, 690.0), (0.1, 680.0), (0.2, 640.0)]
    ]

    path = draw_latency(rows, tmp_path / "figures" / "latency.png")

    with Image.open(path) as image:
        assert image.size == (1050, 690)
        assert len(image.convert("RGB").getcolors(2**20) or ()) > 50


def test_rows_without_latency_are_no_figure(tmp_path: pathlib.Path) -> None:
    with pytest.raises(ValueError, match="run `python -m benchmarking loader_epoch`"):
        draw_latency([make_demo_row()], tmp_path / "latency.png")


def test_the_demo_figure_is_drawn_without_a_screen(tmp_path: pathlib.Path) -> None:
    epochs = [Epoch(30.0, 20.0, 0.02, 150.0), Epoch(60.0, 55.0, 0.02, 150.0)]

    path = draw_demo(make_demo_row(), epochs, tmp_path / "demo.png")

    with Image.open(path) as image:
        assert image.size == (1500, 690)


def test_the_caption_of_the_demo_says_what_its_bars_show() -> None:
    ours, ram = [70.0, 78.0, 80.0], [96.0, 100.0, 110.0]
    row = make_demo_row()
    figures = {
        "ratio": [rate / 2.0 for rate in ours],
        "ram_ratio": paired_ratio(ours, ram),  # its median is 0.73
        "ours_images_per_s": ours,
        "torch_images_per_s": 2.0,
        "ram_images_per_s": ram,
    }
    row = make_row("demo", "ours and torch's", row.settings, figures)

    text = _caption(row, [])

    assert "ours is 39 times as fast as torch's DataLoader, 0.78 times as fast" in text


def test_epochs_are_read_from_the_trainers_log_in_order(tmp_path: pathlib.Path) -> None:
    log = tmp_path / "log.jsonl"
    lines = [{"kind": "settings"}] + [
        {
            "kind": "epoch",
            "train": {"acc1": 50.0 + n, "wait_s": 1.0, "time_s": 4.0, "num_images": 400},
            "val": {"acc1": 40.0 + n},
        }
        for n in range(2)
    ]
    log.write_text("\n".join(map(json.dumps, lines)))

    assert read_epochs(log) == [Epoch(50.0, 40.0, 0.25, 100.0), Epoch(51.0, 41.0, 0.25, 100.0)]
