"""Data sets of real photographs, made on the spot from those that ship inside well-kept packages.

Each photograph of scikit-image and scikit-learn named below is a class, each sample a
crop of it. Made in seconds, from a seed, without network: the same seed and releases give the
same bytes.

Two sets:

- `make_benchmark_set`: JPEGs of 110 kB in the mean, 512 x 384, which is what ImageNet's are like
  (110 kB in the mean, most of them 500 x 375). Quality 96, without chroma subsampling, was tuned
  for that.
- `make_demo_set`: square crops of 75 kB that a small network learns to tell apart in a few epochs.
  ``train`` comes from the left or upper 60 % of each photograph, ``val`` from the rest: no pixel is
  in both.
"""

from __future__ import annotations

import concurrent.futures
import functools
import importlib.util
import os
import pathlib
import shutil
import tempfile
from typing import Literal, NamedTuple

import numpy as np
from PIL import Image

from concurrent_dataloader.errors import MissingDependencyError

Split = Literal["train", "val"]


class Photograph(NamedTuple):
    """A photograph inside an installed package."""

    name: str
    """The class that its crops belong to."""
    package: str
    """As imported."""
    distribution: str
    """As installed by pip."""
    path: str
    """Below the package's folder."""
    cut: Literal["left-right", "top-bottom"] = "left-right"
    """Which way it is divided into ``train`` and ``val``, so that each has some of the subject."""


PHOTOGRAPHS = (
    Photograph("astronaut", "skimage", "scikit-image", "data/astronaut.png"),
    Photograph("cat", "skimage", "scikit-image", "data/chelsea.png"),
    Photograph("coffee", "skimage", "scikit-image", "data/coffee.png"),
    Photograph("flower", "sklearn", "scikit-learn", "datasets/images/flower.jpg"),
    Photograph("galaxies", "skimage", "scikit-image", "data/hubble_deep_field.jpg"),
    Photograph("motorcycle", "skimage", "scikit-image", "data/motorcycle_left.png"),
    Photograph("retina", "skimage", "scikit-image", "data/retina.jpg"),
    Photograph("rocket", "skimage", "scikit-image", "data/rocket.jpg"),
    Photograph("temple", "sklearn", "scikit-learn", "datasets/images/china.jpg", "top-bottom"),
    Photograph("tissue", "skimage", "scikit-image", "data/ihc.png"),
)
"""All are free to use; the packages' notices say by whom they were taken."""

BENCHMARK_SIZE = (512, 384)
BENCHMARK_QUALITY = 96
DEMO_SIZE = (384, 384)
_REVISION = 1
"""Part of the cached folders' names; raised when the crops change."""


def make_benchmark_set(
    num_images: int, *, seed: int = 0, cache: pathlib.Path | None = None
) -> pathlib.Path:
    """Make, or find again, a folder ``<class>/<class>_<number>.jpg`` of 110 kB JPEGs.

    Args:
        num_images: Files in all, spread evenly over the classes.
        seed: Of where the crops lie.
        cache: Folder that keeps the sets; None: `default_cache`.

    Returns:
        The folder. It is complete, or not there: it is filled under another name and then renamed.

    Raises:
        MissingDependencyError: A package that brings photographs is not installed.
        ValueError: ``num_images`` is below 1.
    """
    if num_images < 1:
        raise ValueError(f"num_images: got {num_images}, expected 1 or more")
    folder = (cache or default_cache()) / f"photos-r{_REVISION}-n{num_images}-s{seed}"
    if folder.exists():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    begun = pathlib.Path(tempfile.mkdtemp(prefix=f"{folder.name}.", dir=folder.parent))
    jobs = [
        (begun / f"{photograph.name}/{photograph.name}_{number:05d}.jpg", which, number)
        for position in range(num_images)
        for number, which in [divmod(position, len(PHOTOGRAPHS))]
        for photograph in [PHOTOGRAPHS[which]]
    ]
    _write_all(
        [
            functools.partial(_write_benchmark_image, path, which, number, seed)
            for path, which, number in jobs
        ]
    )
    try:
        begun.rename(folder)
    except OSError:
        # Another process was first; its files are the same as ours.
        shutil.rmtree(begun)
        if not folder.exists():
            raise
    return folder


def make_demo_set(
    folder: pathlib.Path, *, num_train: int = 640, num_val: int = 160, seed: int = 0
) -> pathlib.Path:
    """Fill ``folder`` with ``train/<class>/*.jpg`` and ``val/<class>/*.jpg``.

    Files of these names are replaced, others stay.

    Args:
        folder: Where to; made if need be.
        num_train: Training images in all, spread evenly over the ten classes.
        num_val: Validation images in all, likewise.
        seed: Of where the crops lie.

    Returns:
        ``folder``.

    Raises:
        MissingDependencyError: A package that brings photographs is not installed.
    """
    jobs: list[functools.partial[None]] = []
    sizes: tuple[tuple[Split, int], ...] = (("train", num_train), ("val", num_val))
    for split, num_images in sizes:
        for position in range(num_images):
            number, which = divmod(position, len(PHOTOGRAPHS))
            name = PHOTOGRAPHS[which].name
            path = folder / split / name / f"{name}_{number:05d}.jpg"
            jobs.append(functools.partial(_write_demo_image, path, which, number, split, seed))
    _write_all(jobs)
    return folder


def default_cache() -> pathlib.Path:
    """Name the folder that keeps benchmark sets between runs."""
    given = os.environ.get("XDG_CACHE_HOME")
    root = pathlib.Path(given) if given else pathlib.Path.home() / ".cache"
    return root / "concurrent-dataloader"


def _write_all(jobs: list[functools.partial[None]]) -> None:
    """Run all jobs in threads, since Pillow leaves the interpreter's lock; raise first error."""
    for photograph in PHOTOGRAPHS:
        _open_photograph(photograph)
    with concurrent.futures.ThreadPoolExecutor(len(os.sched_getaffinity(0))) as threads:
        for _ in threads.map(lambda job: job(), jobs):
            pass


def _write_benchmark_image(path: pathlib.Path, which: int, number: int, seed: int) -> None:
    """Cut a 4:3 part of 70 to 100 % of the largest that fits, and bring it to `BENCHMARK_SIZE`."""
    rng = np.random.default_rng([seed, which, number, 0])
    photograph = _open_photograph(PHOTOGRAPHS[which])
    width, height = BENCHMARK_SIZE
    largest = min(photograph.width / width, photograph.height / height)
    scale = largest * rng.uniform(0.7, 1.0)
    box = _draw_box((0, 0, *photograph.size), width * scale, height * scale, rng)
    crop = photograph.resize(BENCHMARK_SIZE, Image.Resampling.BICUBIC, box=box)
    _save(crop, path, BENCHMARK_QUALITY, subsampling="4:4:4")


def _write_demo_image(path: pathlib.Path, which: int, number: int, split: Split, seed: int) -> None:
    """Cut a square out of the split's part of the photograph, of like size in both splits."""
    rng = np.random.default_rng([seed, which, number, 1 if split == "train" else 2])
    photograph = _open_photograph(PHOTOGRAPHS[which])
    width, height = float(photograph.width), float(photograph.height)
    if PHOTOGRAPHS[which].cut == "left-right":
        parts = {"train": (0.0, 0.0, 0.6 * width, height), "val": (0.6 * width, 0.0, width, height)}
        side = min(0.4 * width, height) * rng.uniform(0.7, 1.0)
    else:
        parts = {
            "train": (0.0, 0.0, width, 0.6 * height),
            "val": (0.0, 0.6 * height, width, height),
        }
        side = min(width, 0.4 * height) * rng.uniform(0.7, 1.0)
    box = _draw_box(parts[split], side, side, rng)
    crop = photograph.resize(DEMO_SIZE, Image.Resampling.BICUBIC, box=box)
    _save(crop, path, BENCHMARK_QUALITY, subsampling="4:4:4")


def _draw_box(
    bounds: tuple[float, float, float, float],
    width: float,
    height: float,
    rng: np.random.Generator,
) -> tuple[float, float, float, float]:
    """Draw where a box of that size lies within the bounds; left, top, right, bottom in pixels."""
    left, top, right, bottom = bounds
    x = left + rng.uniform(0.0, 1.0) * max(0.0, right - left - width)
    y = top + rng.uniform(0.0, 1.0) * max(0.0, bottom - top - height)
    return (x, y, min(x + width, right), min(y + height, bottom))


def _save(crop: Image.Image, path: pathlib.Path, quality: int, subsampling: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    crop.save(path, "JPEG", quality=quality, subsampling=subsampling)


@functools.cache
def _open_photograph(photograph: Photograph) -> Image.Image:
    """Read a photograph whole, RGB. Its package is found, not imported: that takes seconds."""
    spec = importlib.util.find_spec(photograph.package)
    if spec is None or not spec.submodule_search_locations:
        raise MissingDependencyError(
            f"photographs: {photograph.name!r} ships with {photograph.distribution}, which is not "
            f"installed; run `pip install {photograph.distribution}`"
        )
    path = pathlib.Path(spec.submodule_search_locations[0]) / photograph.path
    if not path.exists():
        raise MissingDependencyError(
            f"photographs: {photograph.name!r} is not in the installed {photograph.distribution}, "
            f"expected {photograph.path}; run `pip install --upgrade {photograph.distribution}`"
        )
    with Image.open(path) as image:
        return image.convert("RGB")
