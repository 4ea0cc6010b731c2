from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from concurrent_dataloader.formats.lmdb_record import (
    DatabaseMetadata,
    Record,
    pack_labels,
    pack_record,
)
from concurrent_dataloader.formats.lmdb_writer import LmdbWriter
from concurrent_dataloader.prepare.deep_lmdb import check_database, check_record_again
from concurrent_dataloader.prepare.samples import BadSample, Rules
from tests.prepare.test_validate import encode_image


class Interrupting(int):
    """A number of classes at whose sight a user presses Ctrl-C."""

    def __gt__(self, other: object) -> bool:
        raise KeyboardInterrupt


@pytest.mark.parametrize(
    "check",
    [
        lambda path, rules: check_database(path, rules, is_deep=True),
        lambda path, rules: check_record_again(
            path, BadSample(path.name, "0", None, "lmdb", "is bad"), rules
        ),
    ],
    ids=["all", "again"],
)
def test_a_database_is_closed_also_when_checking_it_is_interrupted(
    tmp_path: Path, check: Callable[[Path, Rules], object]
) -> None:
    path = tmp_path / "x.lmdb"
    metadata = DatabaseMetadata(1, "list", None, "train", None, None, "plan", complete=True)
    with LmdbWriter(path) as writer:
        writer.put_record(0, pack_record(Record("0.jpg", 0, encode_image(0))))
        writer.put_metadata(metadata, pack_labels([0]))

    # The error is kept, and with it the frame that opened the file.
    with pytest.raises(KeyboardInterrupt) as caught:
        check(path, Rules(num_classes=Interrupting(1)))

    assert str(path) not in Path("/proc/self/maps").read_text()
    assert caught.value.__traceback__ is not None
