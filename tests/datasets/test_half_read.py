"""A script that ends while it holds iterators that are half read prints nothing, and ends."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.datasets.conftest import encode_image
from tests.datasets.shards import write_shards

# At module level: a function's own variables are gone before the interpreter ends.
STREAMS = """
import sys
import torch.utils.data
from concurrent_dataloader.dataloader_mod.dataloader import DataLoader
from concurrent_dataloader.datasets import StreamedShards

def open_stream(**options):
    return StreamedShards(sys.argv[1], decode=None, **options)

plain = iter(open_stream())
shuffled = iter(open_stream(shuffle=True, index=None))
skipping = open_stream().iter_skipping(print)
torchs = iter(torch.utils.data.DataLoader(open_stream(), batch_size=2, collate_fn=list))
ours = iter(DataLoader(open_stream(), batch_size=2, collate_fn=list))
on_error = iter(DataLoader(open_stream(), batch_size=2, collate_fn=list, on_error="skip"))
for each in (plain, shuffled, skipping, torchs, ours, on_error):
    next(each)
unread = iter(open_stream())
over = iter(open_stream())
assert len(list(over)) == 60
"""

SAMPLES = """
import sys
from concurrent_dataloader.dataloader_mod.dataloader import DataLoader
from concurrent_dataloader.datasets import ScratchDataset, open_shards

shards, images = open_shards(sys.argv[1], decode=bytes), ScratchDataset(sys.argv[2], decode=bytes)
half_read = [
    iter(DataLoader(dataset, batch_size=2, collate_fn=list, fetch_impl=fetch_impl))
    for dataset in (shards, images)
    for fetch_impl in ("threaded", "asyncio")
]
for each in half_read:
    next(each)
unread = iter(DataLoader(shards, batch_size=2, collate_fn=list))
"""

COMMAND = """
import sys
from concurrent_dataloader.datasets.streamed import ReadSettings, StreamedShards

command = f"pipe:echo $$ > {sys.argv[2]}; cat {sys.argv[1]}; sleep 1000"
reading = ReadSettings(part_bytes=1024)  # a part is whole before the command waits
samples = iter(StreamedShards(command, allow_pipe=True, decode=None, reading=reading))
next(samples)
"""


def run_script(code: str, errors: Path, *arguments: Path) -> None:
    """Run a script to its end; what it says of errors goes to a file, which children may hold."""
    with errors.open("w") as file:
        subprocess.run(
            [sys.executable, "-X", "dev", "-c", code, *map(str, arguments)],
            stderr=file,
            check=True,
            timeout=120,
        )


@pytest.mark.parametrize("code", [STREAMS, SAMPLES], ids=["streams", "samples"])
def test_nothing_is_printed_when_a_script_ends(code: str, tmp_path: Path) -> None:
    folder = write_shards(tmp_path / "shards", [30, 30])
    images = tmp_path / "images" / "a"
    images.mkdir(parents=True)
    for number in range(9):
        (images / f"{number}.jpg").write_bytes(encode_image(number))

    run_script(code, tmp_path / "errors", folder, images.parent)

    assert (tmp_path / "errors").read_text() == ""


def test_a_command_ends_with_the_script_that_reads_it(tmp_path: Path) -> None:
    folder = write_shards(tmp_path / "shards", [30])

    run_script(COMMAND, tmp_path / "errors", folder / "train-000000.tar", tmp_path / "pid")

    shell = int((tmp_path / "pid").read_text())
    try:
        with pytest.raises(ProcessLookupError):
            os.kill(shell, 0)
        assert (tmp_path / "errors").read_text() == ""
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(shell, signal.SIGKILL)
