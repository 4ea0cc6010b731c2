"""From nothing to a trained model: photographs, a slow object store, an index, a comparison.

Command: ``python -m benchmarking.demo``; it is what ``./run demo`` runs. It can be repeated: what
an earlier run left in the output folder is replaced.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import functools
import importlib.util
import os
import pathlib
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

from benchmarking.effort import Effort
from benchmarking.measure import (
    OpenLoader,
    Speed,
    check_same_batches,
    column,
    measure_in_turns,
    measure_speed,
)
from benchmarking.photos import PHOTOGRAPHS, make_demo_set
from benchmarking.plots.demo import Epoch, draw_demo, read_epochs
from benchmarking.results import Row, append_rows, format_estimate, make_row
from benchmarking.statistics import paired_ratio
from benchmarking.workload import (
    BUCKET,
    LATENCY_SIGMA,
    NUM_WORKERS,
    TRANSFORM,
    Photos,
    images_of,
    our_loader,
    ram_store,
    remote_store,
    torch_loader,
)
from concurrent_dataloader.stores import Credentials, open_writable_store
from concurrent_dataloader.testing import ObjectServer

_NUM_STEPS = 6
_NUM_UPLOADS_AT_ONCE = 32


class Settings(NamedTuple):
    """What the command line may change."""

    output: pathlib.Path = pathlib.Path("runs/demo")
    latency_s: float = 0.1
    num_train: int = 800
    num_val: int = 200
    epochs: int = 6
    crop_size: int = 64
    batch_size: int = 32
    seconds: float = 10.0
    """Time for which torch's loader is measured on the store, at least; ours a third of it."""


def run_demo(settings: Settings) -> Row:
    """Do all steps, and say what each does; the server is stopped however they end."""
    begin_s = time.perf_counter()
    output = settings.output
    output.mkdir(parents=True, exist_ok=True)
    photos = _make_photographs(settings)
    with ObjectServer() as server:
        _start_and_upload(server, photos, settings)
        environment = _client_environment(server)
        _write_indexes(environment, output)
        epochs = _train(environment, server, settings)
        row = _compare(server, photos, settings)
    results = output / "results.jsonl"
    results.unlink(missing_ok=True)
    append_rows(results, [row])
    plot = draw_demo(row, epochs, output / "demo.png")
    _print_end(row, epochs, plot, time.perf_counter() - begin_s)
    return row


def _say(step: int, text: str) -> None:
    print(f"\n[{step}/{_NUM_STEPS}] {text}", flush=True)


def _make_photographs(settings: Settings) -> Photos:
    _say(
        1,
        f"Cut {settings.num_train} training and {settings.num_val} validation images of "
        f"{len(PHOTOGRAPHS)} classes out of photographs that ship with Python packages.",
    )
    folder = settings.output / "photographs"
    shutil.rmtree(folder, ignore_errors=True)
    make_demo_set(folder, num_train=settings.num_train, num_val=settings.num_val)
    paths = sorted(folder.rglob("*.jpg"))
    raw = {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}
    photos = Photos(folder, raw)
    print(f"    {len(raw)} JPEGs of {photos.mean_bytes / 1e3:.1f} kB in {folder}")
    return photos


def _start_and_upload(server: ObjectServer, photos: Photos, settings: Settings) -> None:
    _say(
        2,
        "Start an S3 object server on this machine, let each request wait "
        f"{settings.latency_s * 1e3:g} ms (median of a lognormal), and upload the images to it.",
    )
    server.create_bucket(BUCKET)
    server.set_latency(median_s=settings.latency_s, sigma=LATENCY_SIGMA)
    store = open_writable_store(
        f"s3://{BUCKET}",
        client="boto3",
        credentials=Credentials(server.access_key, server.secret_key),
        endpoint_url=server.endpoint_url,
        region=server.region,
    )
    begin_s = time.perf_counter()
    with concurrent.futures.ThreadPoolExecutor(_NUM_UPLOADS_AT_ONCE) as threads:
        for _ in threads.map(store.put, photos.raw, photos.raw.values()):
            pass
    store.close()
    print(
        f"    {server.endpoint_url}: {len(photos.raw)} objects in "
        f"{time.perf_counter() - begin_s:.1f} s"
    )


def _client_environment(server: ObjectServer) -> dict[str, str]:
    """Give the commands the server's address and keys, and keep the user's own AWS settings out."""
    kept = {name: text for name, text in os.environ.items() if not name.startswith("AWS_")}
    return {**kept, "AWS_EC2_METADATA_DISABLED": "true", **server.environment()}


def _write_indexes(environment: dict[str, str], output: pathlib.Path) -> None:
    _say(3, "List the bucket and write an index of each split, and the classes.")
    for split in ("train", "val"):
        arguments = ["index", f"s3://{BUCKET}/{split}", "--output", str(output / f"{split}.json")]
        if split == "train":
            arguments += ["--classes-output", str(output / "classes.json")]
        print(f"    $ concurrent-dataloader {shlex.join(arguments)}", flush=True)
        command = [sys.executable, "-m", "concurrent_dataloader.prepare", *arguments]
        subprocess.run(command, env=environment, check=True)


def _train(environment: dict[str, str], server: ObjectServer, settings: Settings) -> list[Epoch]:
    _say(4, f"Train ResNet-18 for {settings.epochs} epochs from the bucket; validate after each.")
    training = settings.output / "training"
    shutil.rmtree(training, ignore_errors=True)
    arguments = [
        f"s3://{BUCKET}",
        "--dataset=s3",
        f"--index-file={settings.output / 'train.json'}",
        f"--val-index-file={settings.output / 'val.json'}",
        f"--classes-file={settings.output / 'classes.json'}",
        f"--endpoint-url={server.endpoint_url}",
        "--arch=resnet18",
        f"--image-size={settings.crop_size}",
        f"--epochs={settings.epochs}",
        f"--batch-size={settings.batch_size}",
        f"--workers={NUM_WORKERS}",
        "--lr=0.02",
        "--scheduler=cosine",
        "--seed=0",
        "--print-freq=100",
        f"--output-base-folder={training}",
    ]
    print(f"    $ python imagenet.py {shlex.join(arguments)}", flush=True)
    spec = importlib.util.find_spec("imagenet")
    if spec is None or spec.origin is None:
        raise FileNotFoundError("imagenet.py: not found; run the demo from the repository's folder")
    subprocess.run([sys.executable, spec.origin, *arguments], env=environment, check=True)
    return read_epochs(training / "log.jsonl")


def _compare(server: ObjectServer, photos: Photos, settings: Settings) -> Row:
    _say(
        5,
        "Compare torch's DataLoader with ours: same bucket, same images, transforms (224 px) and "
        f"order, {NUM_WORKERS} workers each. This takes about half a minute, most of it torch's.",
    )
    training = {key: raw for key, raw in photos.raw.items() if key.startswith("train/")}
    photos = Photos(photos.folder, training)
    effort = Effort(
        repeats=1, seconds=settings.seconds, batch_size=settings.batch_size, is_quick=True
    )
    remote = images_of(photos, remote_store(server))
    memory = images_of(photos, ram_store(photos))
    loaders: dict[str, OpenLoader] = {
        "ours": functools.partial(our_loader, remote, effort),
        "RAM": functools.partial(torch_loader, memory, effort),
        "torch": functools.partial(torch_loader, remote, effort),
    }
    check_same_batches(loaders, num_batches=2)
    print("    the first batches of all are equal, bit for bit", flush=True)
    num_seconds = settings.seconds / 3
    quick: dict[str, Callable[[], Speed]] = {
        name: functools.partial(_measure, loaders[name], num_seconds) for name in ("ours", "RAM")
    }
    speeds = measure_in_turns(quick, Effort(repeats=3, seconds=num_seconds))
    (slow,) = measure_in_turns(
        {"torch": functools.partial(_measure, loaders["torch"], settings.seconds, 1)}, effort
    )["torch"]
    ours_per_s, ram_per_s = (column(speeds[name], "images_per_s") for name in ("ours", "RAM"))
    return make_row(
        "demo",
        f"ours and torch's from a store at {settings.latency_s * 1e3:g} ms",
        {
            "latency_median_s": settings.latency_s,
            "latency_sigma": LATENCY_SIGMA,
            "num_images": len(training),
            "num_classes": len(PHOTOGRAPHS),
            "mean_image_bytes": round(photos.mean_bytes),
            "transform": TRANSFORM,
            "batch_size": settings.batch_size,
            "num_workers": NUM_WORKERS,
            "fetch_impl": "threaded",
            "torch_num_images": len(slow.positions),
        },
        {
            "ratio": [rate / slow.images_per_s for rate in ours_per_s],
            "ram_ratio": paired_ratio(ours_per_s, ram_per_s),
            "ours_images_per_s": ours_per_s,
            "torch_images_per_s": slow.images_per_s,
            "ram_images_per_s": ram_per_s,
        },
    )


def _measure(open_loader: OpenLoader, seconds: float, num_warm_up_batches: int = 4) -> Speed:
    return measure_speed(open_loader(), seconds, num_warm_up_batches=num_warm_up_batches)


def _print_end(row: Row, epochs: Sequence[Epoch], plot: pathlib.Path, elapsed_s: float) -> None:
    _say(6, "What was seen.")
    figures = row.figures
    slow_per_s = figures["torch_images_per_s"].median
    latency = f"{float(row.settings['latency_median_s'] or 0) * 1e3:g} ms"
    print(f"\n    {'loader':<34}{'images/s':>24}{'against torch':>16}")
    for label, name in (
        (f"torch's, bucket at {latency}", "torch_images_per_s"),
        (f"ours, the same bucket at {latency}", "ours_images_per_s"),
        ("torch's, the same bytes in RAM", "ram_images_per_s"),
    ):
        ratio = f"x {figures[name].median / slow_per_s:.1f}"
        print(f"    {label:<34}{format_estimate(figures[name]):>24}{ratio:>16}")
    waited = sum(epoch.wait_share for epoch in epochs) / max(1, len(epochs))
    best = max((epoch.val_acc1 for epoch in epochs), default=0.0)
    chance = 100 / len(PHOTOGRAPHS)
    print(
        f"\n    Training from the bucket: best val accuracy {best:.0f} % (chance: {chance:.0f} %), "
        f"{100 * waited:.0f} % of the time waiting for data."
        f"\n    Plot: {plot}\n    Rows: {plot.with_name('results.jsonl')}"
        f"\n    Model: {plot.with_name('training') / 'model_best.pth.tar'}"
        f"\n    Done in {elapsed_s:.0f} s. The object server is stopped.",
        flush=True,
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the demo; gives the exit status."""
    defaults = Settings()
    parser = argparse.ArgumentParser(
        prog="python -m benchmarking.demo", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("--output", type=pathlib.Path, default=defaults.output)
    parser.add_argument("--latency-ms", type=float, default=defaults.latency_s * 1e3)
    parser.add_argument("--epochs", type=int, default=defaults.epochs)
    given = parser.parse_args(arguments)
    settings = defaults._replace(
        output=given.output, latency_s=given.latency_ms / 1e3, epochs=given.epochs
    )
    try:
        run_demo(settings)
    except KeyboardInterrupt:
        print("\ndemo: interrupted; the object server is stopped", file=sys.stderr)
        return 130
    except subprocess.CalledProcessError as error:
        print(
            f"demo: `{shlex.join(map(str, error.cmd[1:4]))} ...` ended with exit status "
            f"{error.returncode}, expected 0; see its message above",
            file=sys.stderr,
        )
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
