"""How many shards: of a sensible size, and enough for each reader."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from concurrent_dataloader.errors import KeyNotFoundError
from concurrent_dataloader.prepare.__main__ import main
from concurrent_dataloader.prepare.advise import GB, Amount, advise, measure
from concurrent_dataloader.stores import open_writable_store
from tests.prepare.shard_sets import make_samples, write_set


@given(
    num_bytes=st.integers(1, 10**15),
    num_ranks=st.integers(1, 64),
    num_workers=st.integers(0, 32),
)
def test_each_reader_has_equally_many_and_sizes_are_in_bounds(
    num_bytes: int, num_ranks: int, num_workers: int
) -> None:
    advice = advise(Amount(num_bytes), num_ranks, num_workers)

    readers = num_ranks * max(1, num_workers)
    assert advice.num_shards >= readers
    assert advice.num_shards % readers == 0
    assert advice.shard_bytes <= 10 * GB
    assert advice.shard_bytes >= GB or advice.num_shards == readers


@pytest.mark.parametrize(
    ("num_bytes", "ranks", "workers", "num_shards"),
    [
        (150 * GB, 8, 4, 128),  # 4 each, of 1.2 GB
        (150 * GB, 1, 4, 16),
        (5 * GB, 8, 4, 32),  # a shard for each reader counts more than its size
        (10**15, 1, 1, 100_000),  # 10 GB each
    ],
)
def test_known_cases(num_bytes: int, ranks: int, workers: int, num_shards: int) -> None:
    assert advise(Amount(num_bytes), ranks, workers).num_shards == num_shards


def test_there_are_no_more_shards_than_samples() -> None:
    advice = advise(Amount(10**6, 5), 8, 4)

    assert (advice.num_shards, advice.max_count) == (5, 1)
    assert any("no more shards than samples" in reason for reason in advice.reasons)


@given(
    num_samples=st.integers(1, 10**7), num_ranks=st.integers(1, 64), num_workers=st.integers(0, 32)
)
def test_counts_are_those_that_the_command_makes(
    num_samples: int, num_ranks: int, num_workers: int
) -> None:
    advice = advise(Amount(num_samples * 100_000, num_samples), num_ranks, num_workers)

    assert advice.max_count is not None
    assert advice.last_count is not None
    made = [advice.max_count] * (advice.num_shards - 1) + [advice.last_count]
    assert sum(made) == num_samples
    assert 1 <= made[-1] <= made[0]


def test_fewer_shards_than_readers_are_told_of() -> None:
    advice = advise(Amount(10**6, 10), 8, 1)

    assert (advice.num_shards, advice.max_count, advice.last_count) == (5, 2, 2)
    assert any("5 shards instead of 8" in reason for reason in advice.reasons)
    assert not any("none idles" in reason for reason in advice.reasons)
    assert advice.reasons[0].endswith("are more than the shards that 10 samples fill")


@pytest.mark.parametrize(
    ("amount", "ranks", "workers", "message"),
    [
        (Amount(0), 1, 1, "bytes: got 0"),
        (Amount(1, 0), 1, 1, "samples: got 0"),
        (Amount(1), 0, 1, "ranks: got 0"),
        (Amount(1), 1, -1, "workers: got -1"),
    ],
)
def test_what_is_out_of_range_is_refused(
    amount: Amount, ranks: int, workers: int, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        advise(amount, ranks, workers)


def test_a_folder_of_images_is_measured_as_it_will_be_packed(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a/1.JPEG").write_bytes(b"x" * 513)
    (tmp_path / "2.png").write_bytes(b"x" * 512)
    (tmp_path / "notes.txt").write_bytes(b"x" * 5000)

    # Of each a header, its blocks, and a header and a block for the label.
    assert measure(str(tmp_path)) == Amount((3 + 2) * 512 + (2 + 2) * 512, 2)


def test_shards_are_measured_as_they_are(tmp_path: Path) -> None:
    write_set(open_writable_store(tmp_path), [make_samples(3), make_samples(4, first=3)])

    size = sum(path.stat().st_size for path in tmp_path.glob("*.tar"))
    assert measure(str(tmp_path)) == Amount(size, 7)


def test_an_empty_place_is_named(tmp_path: Path) -> None:
    with pytest.raises(KeyNotFoundError, match="no file that ends in"):
        measure(str(tmp_path))


def test_a_place_of_databases_is_told_what_is_looked_for(tmp_path: Path) -> None:
    (tmp_path / "ILSVRC-train.lmdb").write_bytes(bytes(5000))

    with pytest.raises(KeyNotFoundError, match=r"such as train-00000-of-01024\); 'ILSVRC-train"):
        measure(str(tmp_path))


def test_records_without_metadata_are_measured_and_packed_anew(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for number in range(2):
        (tmp_path / f"train-{number:05d}-of-00002").write_bytes(bytes(5000))

    assert measure(str(tmp_path)) == Amount(10_000, is_tfrecord=True)
    assert main(["advise", str(tmp_path), "--workers", "2"]) == 0

    said = capsys.readouterr().out
    assert said.startswith("10 kB\nrecommended: 2 shards of 5 kB\n")
    assert "as in: concurrent-dataloader shard SOURCE TARGET --maxsize 5000\n" in said


def test_the_command_says_how_many_and_why(capsys: pytest.CaptureFixture[str]) -> None:
    status = main(
        ["advise", "--bytes", "150GB", "--samples", "1281167", "--ranks", "8", "--workers", "4"]
    )

    out = capsys.readouterr().out
    assert status == 0
    assert "150 GB, 1281167 samples" in out
    assert "recommended: 128 shards of 1.17 GB, 10010 samples each but 9897 in the last\n" in out
    assert "32 readers (8 ranks x 4 workers) with 4 shards each" in out
    assert "shard SOURCE TARGET --maxcount 10010" in out


def test_the_command_counts_a_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for number in range(10):
        (tmp_path / f"{number}.jpg").write_bytes(b"x" * 1000)

    assert main(["advise", str(tmp_path), "--workers", "2"]) == 0
    assert "recommended: 2 shards of 12.8 kB, 5 samples each\n" in capsys.readouterr().out


def test_a_number_that_cannot_be_is_a_usage_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["advise", "--bytes", "0"]) == 2
    assert "--bytes: got 0" in capsys.readouterr().err


def test_nothing_to_advise_on_is_a_usage_error(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["advise"])
    assert "neither SOURCE nor --bytes" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["many", "5 XB", "1.2.3GB", "", "1e999"])
def test_a_size_that_is_none_is_a_usage_error(text: str) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["advise", "--bytes", text])
