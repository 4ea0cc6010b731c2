"""Archives on a store become shards without ever being whole in memory, or, if plain, on a disk."""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from concurrent_dataloader.datasets import open_shards
from concurrent_dataloader.testing import ObjectServer
from tests.prepare.source_files import make_tar

NUM_IMAGES, IMAGE_BYTES = 144, 1 << 20

PACK = """
import resource, sys

from concurrent_dataloader.prepare.__main__ import main

if int(sys.argv[1]):
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]),) * 2)
status = main(sys.argv[2:])
# Not getrusage, whose maximum begins with that of the process that this one was started by.
with open("/proc/self/status") as file:
    print(next(line.split()[1] for line in file if line.startswith("VmHWM:")))
raise SystemExit(status)
"""


def pack(
    server: ObjectServer, source: str, target: Path, *, max_file_bytes: int = 0
) -> tuple[int, str]:
    """Pack an archive in a process of its own; gives its peak in MiB, and what it said."""
    credentials = target.with_name("credentials.json")
    credentials.write_text(
        json.dumps({"access_key": server.access_key, "secret": server.secret_key})
    )
    store = ["--endpoint-url", server.endpoint_url, "--credentials", str(credentials)]
    verb = ["shard", source, str(target), "--maxsize", "8MB", *store]
    done = subprocess.run(
        [sys.executable, "-c", PACK, str(max_file_bytes), *verb],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "TMPDIR": str(target.parent)},
    )
    assert done.returncode == 0, done.stderr
    return int(done.stdout.split()[-1]) // 1024, done.stdout + done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("ending", ["tar", "tar.gz"])
def test_115_a_remote_archive_is_packed_without_being_whole_in_memory(
    ending: str, object_server: ObjectServer, tmp_path: Path
) -> None:
    rng = np.random.default_rng(0)
    images = {f"c{n % 3}/{n:03}.jpg": rng.bytes(IMAGE_BYTES) for n in range(NUM_IMAGES)}
    # Noise does not get smaller; level 0 saves the time to find that out.
    packed = {
        name: make_tar(files) if ending == "tar" else gzip.compress(make_tar(files), 0)
        for name, files in (("large", images), ("small", dict(list(images.items())[:3])))
    }
    object_server.put_objects("data", {f"{name}.{ending}": raw for name, raw in packed.items()})
    # A file as large as the archive cannot be written: a plain one is read by ranges.
    limit = 16 << 20 if ending == "tar" else 0

    small_mib, _ = pack(object_server, f"s3://data/small.{ending}", tmp_path / "small")
    large_mib, _ = pack(
        object_server, f"s3://data/large.{ending}", tmp_path / "large", max_file_bytes=limit
    )

    whole_mib = NUM_IMAGES * IMAGE_BYTES >> 20
    assert large_mib - small_mib < whole_mib / 2
    dataset = open_shards(tmp_path / "large", decode=None)
    assert len(dataset) == NUM_IMAGES
    for position in range(0, NUM_IMAGES, 7):
        raw, label = dataset[position]
        number = int(dataset.key(position).rpartition("/")[2].partition(".")[0][-3:])
        name = f"c{label}/{number:03}.jpg"
        assert bytes(raw) == images[name]
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {"credentials.json", "small", "large"}
