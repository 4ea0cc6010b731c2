"""Windows of frames out of HDF5 and npy files."""

from __future__ import annotations

import asyncio
import pickle
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from concurrent_dataloader import DataLoader
from concurrent_dataloader.datasets.array_windows import (
    DEFAULT_INPUT_OFFSETS,
    DEFAULT_TARGET_OFFSETS,
    Mode,
    WindowDataset,
    open_windows,
)
from concurrent_dataloader.errors import (
    ByteRangeError,
    IndexFormatError,
    KeyNotFoundError,
    ShardFormatError,
)
from concurrent_dataloader.formats.arrays import KnownBytes, MissingBytesError
from concurrent_dataloader.index import Index
from concurrent_dataloader.ranges import ByteRange
from concurrent_dataloader.stores import Credentials, Store, open_store
from concurrent_dataloader.testing import ObjectServer

MODES: list[Mode] = ["download", "ranged", "streaming"]

Write = Callable[[Path, NDArray[Any]], None]


def write_hdf5(
    path: Path, array: NDArray[Any], *, libver: str = "earliest", **options: Any
) -> None:
    with h5py.File(path, "w", libver=libver) as file:
        file.create_dataset("array", data=array, **options)


WRITERS: dict[str, Write] = {
    "a frame a chunk": lambda p, a: write_hdf5(p, a, chunks=(1, *a.shape[1:]), compression="gzip"),
    "chunks across": lambda p, a: write_hdf5(
        p, a, chunks=(7, 3, 5), compression="lzf", shuffle=True
    ),
    "newest library": lambda p, a: write_hdf5(p, a, libver="latest", chunks=(2, *a.shape[1:])),
    "contiguous": write_hdf5,
    "user block": lambda p, a: write_hdf5_behind_user_block(p, a),
    "may grow": lambda p, a: write_hdf5(p, a, maxshape=(None, *a.shape[1:]), fletcher32=True),
    "half written": lambda p, a: write_half(p, a),
}


def write_hdf5_behind_user_block(path: Path, array: NDArray[Any]) -> None:
    with h5py.File(path, "w", userblock_size=1024) as file:
        file.create_dataset("array", data=array, chunks=(1, *array.shape[1:]))


def write_half(path: Path, array: NDArray[Any]) -> None:
    """Leave the second half to the fill value, so that its chunks do not exist."""
    with h5py.File(path, "w") as file:
        dataset = file.create_dataset(
            "array", array.shape, array.dtype, chunks=(1, *array.shape[1:]), fillvalue=7
        )
        dataset[: len(array) // 2] = array[: len(array) // 2]
    array[len(array) // 2 :] = 7


def make_array(seed: int, num_frames: int = 40) -> NDArray[np.int16]:
    return np.random.default_rng(seed).integers(-999, 999, (num_frames, 6, 11), np.int16)


def make_dataset(
    root: Path, mode: Mode, store: Store | None = None, pattern: str = "*", **options: Any
) -> WindowDataset:
    keys = sorted(path.name for path in root.glob(pattern) if path.is_file())
    if mode == "download":
        options["download_folder"] = root / "downloads" / "here"
    return WindowDataset(Index.from_keys(keys), store or open_store(root), mode=mode, **options)


def expect(array: NDArray[Any], first: int) -> tuple[NDArray[Any], NDArray[Any]]:
    inputs = np.stack([array[first + offset] for offset in DEFAULT_INPUT_OFFSETS])
    targets = np.stack([array[first + offset] for offset in DEFAULT_TARGET_OFFSETS])
    return inputs, targets


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("writer", WRITERS)
def test_a_window_is_what_slicing_the_array_gives(tmp_path: Path, mode: Mode, writer: str) -> None:
    arrays = [make_array(0), make_array(1)]
    for number, array in enumerate(arrays):
        WRITERS[writer](tmp_path / f"{number}.h5", array)
    dataset = make_dataset(tmp_path, mode)

    assert len(dataset) == 2 * (40 - 23)
    for position in (0, 1, 8, 16, 17, 33):
        inputs, targets = dataset[position]
        expected_inputs, expected_targets = expect(arrays[position // 17], position % 17)
        assert inputs.dtype == np.int16
        np.testing.assert_array_equal(inputs, expected_inputs)
        np.testing.assert_array_equal(targets, expected_targets)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("version", [(1, 0), (2, 0)])
def test_row_49_npy_files_give_the_same_windows(
    tmp_path: Path, mode: Mode, version: tuple[int, int]
) -> None:
    array = make_array(0)
    write_hdf5(tmp_path / "a.h5", array)
    with (tmp_path / "a.npy").open("wb") as file:
        np.lib.format.write_array(file, array, version)
    by_hdf5 = make_dataset(tmp_path, mode, pattern="*.h5")
    by_npy = make_dataset(tmp_path, mode, pattern="*.npy")

    assert len(by_hdf5) == len(by_npy) == 17
    for position in range(len(by_npy)):
        for one, other in zip(by_hdf5[position], by_npy[position], strict=True):
            np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("mode", MODES)
def test_i41_the_last_window_is_there_and_one_past_it_is_not(tmp_path: Path, mode: Mode) -> None:
    array = make_array(0, 288)
    write_hdf5(tmp_path / "a.h5", array)
    dataset = make_dataset(tmp_path, mode, num_windows=240)

    assert len(dataset) == 240
    np.testing.assert_array_equal(dataset[239][1], expect(array, 239)[1])
    np.testing.assert_array_equal(dataset[-1][1], expect(array, 239)[1])
    for position in (240, -241):
        with pytest.raises(IndexError, match=f"got {position}, expected -240 to 239"):
            dataset[position]
    assert len(make_dataset(tmp_path, mode)) == 288 - 23


def test_offsets_are_free_and_may_overlap(tmp_path: Path) -> None:
    array = make_array(0)
    write_hdf5(tmp_path / "a.h5", array, chunks=(4, 6, 11))
    dataset = make_dataset(tmp_path, "ranged", input_offsets=[5, 0], target_offsets=[5, 30])

    inputs, targets = dataset[3]

    assert len(dataset) == 10
    np.testing.assert_array_equal(inputs, array[[8, 3]])
    np.testing.assert_array_equal(targets, array[[8, 33]])


@pytest.mark.parametrize("target_offsets", [[2, 3], [1, 2]])
def test_what_is_done_to_inputs_in_place_is_not_done_to_targets(
    tmp_path: Path, target_offsets: list[int]
) -> None:
    array = make_array(0)
    write_hdf5(tmp_path / "a.h5", array)
    dataset = make_dataset(tmp_path, "ranged", input_offsets=[0, 1], target_offsets=target_offsets)

    inputs, targets = dataset[4]
    inputs[:] = 0

    np.testing.assert_array_equal(targets, array[[4 + offset for offset in target_offsets]])


def open_bucket(server: ObjectServer) -> Store:
    return open_store(
        "s3://data",
        endpoint_url=server.endpoint_url,
        credentials=Credentials(server.access_key, server.secret_key),
    )


@pytest.fixture(params=["a.h5", "a.npy"])
def remote(
    request: pytest.FixtureRequest, object_server: ObjectServer, tmp_path: Path
) -> tuple[ObjectServer, NDArray[Any], int]:
    """A bucket with one file of about 2 MB; gives the array, and the file's size."""
    array = np.random.default_rng(0).integers(0, 255, (100, 100, 200), np.uint8)
    path = tmp_path / request.param
    if path.suffix == ".npy":
        np.save(path, array)
    else:
        write_hdf5(path, array, chunks=(1, 100, 200), compression="gzip")
    object_server.put_folder("data", tmp_path)
    return object_server, array, path.stat().st_size


def test_row_48_reading_one_window_downloads_less_than_the_file(
    remote: tuple[ObjectServer, NDArray[Any], int], tmp_path: Path
) -> None:
    server, array, size_bytes = remote
    sent: dict[Mode, int] = {}
    items: dict[Mode, Any] = {}
    for mode in MODES:
        dataset = make_dataset(tmp_path, mode, open_bucket(server), "a.*", num_frames=100)
        server.reset_counters()
        items[mode] = dataset[60]
        sent[mode] = server.counters().body_bytes_sent

    assert sent["streaming"] == sent["download"] == size_bytes
    assert sent["ranged"] < 0.4 * size_bytes
    for mode in MODES:
        np.testing.assert_array_equal(items[mode][0], expect(array, 60)[0])
        np.testing.assert_array_equal(items[mode][1], expect(array, 60)[1])


def test_the_place_of_the_frames_is_found_out_once(
    remote: tuple[ObjectServer, NDArray[Any], int], tmp_path: Path
) -> None:
    server, _, _ = remote
    dataset = make_dataset(tmp_path, "ranged", open_bucket(server), "a.*", num_frames=100)
    _ = dataset[0]
    server.reset_counters()

    _ = dataset[50]

    # Frames 50 to 64 lie side by side, and so may those up to 73.
    assert server.counters().num_by_method.keys() == {"GET"}
    assert server.counters().num_gets <= 4


def test_the_downloaded_file_is_read_from_disk(
    remote: tuple[ObjectServer, NDArray[Any], int], tmp_path: Path
) -> None:
    server, _, _ = remote
    dataset = make_dataset(tmp_path, "download", open_bucket(server), "a.*", num_frames=100)
    _ = dataset[0]
    server.reset_counters()

    _ = dataset[70]
    again = make_dataset(tmp_path, "download", open_bucket(server), "a.*", num_frames=100)
    _ = again[3]

    assert server.counters().num_requests == 0


def test_windows_that_are_begun_together_share_requests(
    remote: tuple[ObjectServer, NDArray[Any], int], tmp_path: Path
) -> None:
    server, _, size_bytes = remote
    dataset = make_dataset(tmp_path, "ranged", open_bucket(server), "a.*", num_frames=100)
    server.reset_counters()

    loader = DataLoader(dataset, batch_size=8)
    batches = [(inputs.clone(), targets.clone()) for inputs, targets in loader]

    counters = server.counters()
    assert counters.num_gets < len(dataset) / 2
    assert counters.body_bytes_sent < 4 * size_bytes  # one window alone is a fifth of the file
    plain = torch.utils.data.DataLoader(dataset, batch_size=8)
    for ours, theirs in zip(batches, plain, strict=True):
        assert torch.equal(ours[0], theirs[0])
        assert torch.equal(ours[1], theirs[1])


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("fetch_impl", ["threaded", "asyncio"])
def test_batches_are_those_of_torchs_loader(tmp_path: Path, mode: Mode, fetch_impl: Any) -> None:
    for number in range(3):
        write_hdf5(tmp_path / f"{number}.h5", make_array(number, 30), chunks=(4, 6, 11))
    dataset = make_dataset(tmp_path, mode)
    settings: dict[str, Any] = {"batch_size": 4, "shuffle": True, "num_workers": 2}

    torch.manual_seed(5)
    theirs = [
        (inputs.clone(), targets.clone())
        for inputs, targets in torch.utils.data.DataLoader(dataset, **settings)
    ]
    torch.manual_seed(5)
    ours = [
        (inputs.clone(), targets.clone())
        for inputs, targets in DataLoader(dataset, fetch_impl=fetch_impl, **settings)
    ]

    assert len(ours) == len(theirs) == 6
    for one, other in zip(ours, theirs, strict=True):
        assert torch.equal(one[0], other[0])
        assert torch.equal(one[1], other[1])


def test_it_pickles_and_reads_on(tmp_path: Path) -> None:
    array = make_array(0)
    write_hdf5(tmp_path / "a.h5", array)
    dataset = make_dataset(tmp_path, "ranged")
    _ = dataset[0]

    again = pickle.loads(pickle.dumps(dataset))

    np.testing.assert_array_equal(again[2][0], expect(array, 2)[0])


def test_awaited_reads_give_the_same_bytes(tmp_path: Path) -> None:
    write_hdf5(tmp_path / "a.h5", make_array(0))
    dataset = make_dataset(tmp_path, "ranged")

    assert asyncio.run(dataset.fetch_async(3)) == dataset.fetch(3)
    many = asyncio.run(dataset.fetch_many_async([3, 4]))
    assert list(many) == [dataset.fetch(3), dataset.fetch(4)]


def test_w10_windows_of_several_files_are_no_group(tmp_path: Path) -> None:
    for number in range(2):
        write_hdf5(tmp_path / f"{number}.h5", make_array(number))
    dataset = make_dataset(tmp_path, "ranged")

    with pytest.raises(ValueError, match=r"positions: got \[16, 17\] of several files, expected"):
        dataset.fetch_many([16, 17])


def test_a_transform_gets_both_arrays(tmp_path: Path) -> None:
    array = make_array(0)
    write_hdf5(tmp_path / "a.h5", array)
    dataset = make_dataset(tmp_path, "ranged")
    dataset.set_transform(lambda pair: pair[0].sum() + pair[1].sum())

    assert dataset[1] == sum(part.sum() for part in expect(array, 1))


def test_requests_are_planned_by_file_and_overlap(tmp_path: Path) -> None:
    for number in range(2):
        write_hdf5(tmp_path / f"{number}.h5", make_array(number, 200))
    ranged, streaming = (make_dataset(tmp_path, mode) for mode in ("ranged", "streaming"))
    positions = [0, 177, 5, 150, 178]

    assert ranged.plan_requests(positions) == [[0, 2], [1, 4], [3]]
    assert streaming.plan_requests(positions) == [[0, 2, 3], [1, 4]]


def test_row_49_a_filter_limits_the_files(object_server: ObjectServer, tmp_path: Path) -> None:
    for folder, number in (("x/training", 0), ("x/training", 1), ("x/test", 2), ("y", 3)):
        path = tmp_path / folder
        path.mkdir(parents=True, exist_ok=True)
        write_hdf5(path / f"{number}_8ch.h5", make_array(number))
    (tmp_path / "y" / "notes.txt").write_text("no array")
    object_server.put_folder("data", tmp_path)
    store_options = {
        "endpoint_url": object_server.endpoint_url,
        "credentials": Credentials(object_server.access_key, object_server.secret_key),
    }

    def files(pattern: Any, **options: Any) -> list[str]:
        dataset = open_windows("s3://data", file_filter=pattern, store_options=store_options)
        local = open_windows(tmp_path, file_filter=pattern, **options)
        keys = list(local.index.keys())
        assert len(local) == 17 * len(keys)
        assert options or list(dataset.index.keys()) == keys
        return keys

    assert files("*/training/*8ch.h5") == ["x/training/0_8ch.h5", "x/training/1_8ch.h5"]
    assert files(["y/*.h5", "x/test/*"]) == ["x/test/2_8ch.h5", "y/3_8ch.h5"]
    assert len(files("*.h5", limit=3)) == 3
    assert len(open_windows(tmp_path)) == 4 * 17
    with pytest.raises(KeyNotFoundError, match=r"no file fits \*\.nc"):
        open_windows(tmp_path, file_filter="*.nc")


# -- what is refused


def refuse(root: Path, match: str, mode: Mode = "ranged", **options: Any) -> None:
    with pytest.raises(ShardFormatError, match=match):
        _ = make_dataset(root, mode, **options)[0]


@pytest.mark.parametrize("mode", MODES)
def test_an_array_that_is_not_there_is_named(tmp_path: Path, mode: Mode) -> None:
    write_hdf5(tmp_path / "a.h5", make_array(0))

    refuse(
        tmp_path,
        "no dataset 'speed', expected one in this file; its names are 'array'",
        mode,
        dataset_name="speed",
    )


@pytest.mark.parametrize("mode", MODES)
def test_files_that_are_none_are_named(tmp_path: Path, mode: Mode) -> None:
    (tmp_path / "a.h5").write_bytes(b"no HDF5 file" * 1000)

    refuse(tmp_path, "a.h5: no HDF5 file that can be read", mode)

    (tmp_path / "a.h5").unlink()
    (tmp_path / "downloads" / "here" / "a.h5").unlink(missing_ok=True)
    (tmp_path / "a.npy").write_bytes(b"x")

    refuse(tmp_path, "a.npy: got b'x' at its begin, expected an npy file", mode)


def test_files_cut_short_are_found(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", make_array(0))
    whole = (tmp_path / "a.npy").read_bytes()
    (tmp_path / "a.npy").write_bytes(whole[:-1])

    refuse(tmp_path, f"cut short: got {len(whole) - 1} bytes, expected {len(whole)}")

    (tmp_path / "a.npy").unlink()
    write_hdf5(tmp_path / "a.h5", make_array(0), chunks=(1, 6, 11))
    whole = (tmp_path / "a.h5").read_bytes()
    (tmp_path / "a.h5").write_bytes(whole[: len(whole) // 2])

    refuse(tmp_path, "no HDF5 file that can be read")


def test_a_file_with_another_number_of_frames_is_named(tmp_path: Path) -> None:
    write_hdf5(tmp_path / "0.h5", make_array(0, 40))
    write_hdf5(tmp_path / "1.h5", make_array(0, 39))
    dataset = make_dataset(tmp_path, "ranged")
    _ = dataset[16]

    with pytest.raises(ShardFormatError, match=r"1\.h5: got 39 frames, expected 40"):
        _ = dataset[17]


def test_arrays_that_lie_in_other_files_are_refused(tmp_path: Path) -> None:
    secret = tmp_path / "other" / "secret.h5"
    secret.parent.mkdir()
    write_hdf5(secret, make_array(0))
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["array"] = h5py.ExternalLink(str(secret), "array")
        file["group"] = h5py.ExternalLink(str(secret), "/")
        file["soft"] = h5py.SoftLink("/group/array")
        layout = h5py.VirtualLayout((40, 6, 11), np.int16)
        layout[:] = h5py.VirtualSource(str(secret), "array", (40, 6, 11))
        file.create_virtual_dataset("virtual", layout)
        file.create_dataset(
            "external", (40, 6, 11), np.int16, external=[(str(secret), 0, h5py.h5f.UNLIMITED)]
        )

    for name in ("array", "group/array"):
        expected = rf"no dataset '{name}' \(it is a link to another file\), expected one in this"
        refuse(tmp_path, expected, dataset_name=name)
    # HDF5 1 follows links to such links, HDF5 2 finds nothing there.
    expected = r"no dataset 'soft'|of other files, expected numbers in this file"
    refuse(tmp_path, expected, dataset_name="soft")
    for name in ("virtual", "external"):
        refuse(tmp_path, "of other files, expected numbers in this file", dataset_name=name)


@pytest.mark.parametrize(
    "array",
    [np.array([[{}], [1]], object), np.asfortranarray(make_array(0)), np.array(3)],
)
def test_npy_files_that_cannot_be_read_by_ranges_are_refused(
    tmp_path: Path, array: NDArray[Any]
) -> None:
    np.save(tmp_path / "a.npy", array, allow_pickle=True)

    refuse(tmp_path, "expected numbers in C order with a first axis")


def test_an_object_that_was_cut_after_it_was_looked_at_is_an_error(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", make_array(0))
    dataset = make_dataset(tmp_path, "ranged")
    _ = dataset[0]
    (tmp_path / "a.npy").write_bytes((tmp_path / "a.npy").read_bytes()[:2000])

    with pytest.raises(ByteRangeError):
        _ = dataset[16]


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"input_offsets": []}, r"input_offsets: got \[\]"),
        ({"target_offsets": [-1]}, "target_offsets: got"),
        ({"mode": "fast"}, "mode: got 'fast'"),
        ({"mode": "download"}, "download_folder: got None for mode 'download'"),
        ({"download_folder": "x"}, "download_folder: got 'x' for mode 'ranged'"),
        ({"num_frames": 23}, "num_frames: got 23, expected 24 or more"),
        ({"num_frames": 40, "num_windows": 18}, "num_windows: got 18, expected 1 to 17"),
    ],
)
def test_arguments_that_cannot_be_used_are_refused_before_anything_is_read(
    options: dict[str, Any], match: str
) -> None:
    with pytest.raises(ValueError, match=match):
        WindowDataset(Index.from_keys(["a.h5"]), open_store("nowhere"), **options)
    with pytest.raises(IndexFormatError, match="the index: no files"):
        WindowDataset(Index.from_keys([]), open_store("nowhere"))


def test_a_key_does_not_lead_out_of_the_download_folder(tmp_path: Path) -> None:
    dataset = WindowDataset(
        Index.from_keys(["../a.npy"]),
        open_store(tmp_path),
        mode="download",
        download_folder=tmp_path / "here",
        num_frames=40,
    )

    with pytest.raises(KeyNotFoundError, match="leads out of"):
        _ = dataset[0]


# -- parts of files


def test_known_bytes_are_put_together_or_said_to_be_missing() -> None:
    content = bytes(range(256)) * 400
    known = KnownBytes(len(content))
    known.add(100, content[100:200])
    known.add(150, content[150:160])
    known.add(200, content[200:300])

    assert known.read(120, 280) == content[120:280]
    assert known.read(len(content), len(content) + 5) == b""
    with pytest.raises(MissingBytesError) as missing:
        known.read(250, 20_000)
    assert missing.value.byte_range == ByteRange(0, 32768)


def test_memory_does_not_grow_with_the_windows_read(tmp_path: Path) -> None:
    write_hdf5(tmp_path / "a.h5", make_array(0, 300), chunks=(1, 6, 11))
    dataset = make_dataset(tmp_path, "ranged")
    _ = dataset[0]
    tracemalloc.start()
    try:
        before, _ = tracemalloc.get_traced_memory()
        for position in range(1, 200):
            _ = dataset[position]
        after, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()

    assert after - before < 200_000
