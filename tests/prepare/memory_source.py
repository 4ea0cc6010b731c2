"""A source in memory, in a module that imports little, since processes of a pool import it."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping, Sequence

from concurrent_dataloader.errors import LoaderError
from concurrent_dataloader.formats.fields import Box


class MemorySource:
    """A few samples in memory, whose classes are their folders."""

    def __init__(
        self,
        samples: Mapping[str, bytes],
        *,
        boxes: Mapping[str, Sequence[Box]] | None = None,
        has_sizes: bool = True,
        has_labels: bool = True,
        bad: str | None = None,
    ) -> None:
        self.label_space: str | None = None
        folders = sorted({name.partition("/")[0] for name in samples})
        self.classes: Sequence[str] | None = folders if has_labels else None
        self._samples = sorted(samples.items())
        self._boxes = boxes or {}
        self._has_sizes = has_sizes
        self._bad = bad

    def __len__(self) -> int:
        return len(self._samples)

    def name(self, position: int) -> str:
        return self._samples[position][0]

    def label(self, position: int) -> int | None:
        if self.classes is None:
            return None
        return list(self.classes).index(self.name(position).partition("/")[0])

    def boxes(self, position: int) -> Sequence[Box]:
        return self._boxes.get(self.name(position), ())

    def size_bytes(self, position: int) -> int | None:
        return len(self._samples[position][1]) if self._has_sizes else None

    def read(self, position: int) -> bytes:
        if self.name(position) == self._bad:
            raise LoaderError(f"{self._bad}: cannot be read")
        return self._samples[position][1]

    def close(self) -> None:
        pass


class SlowSource(MemorySource):
    """One whose samples come after a while, which counts how many are under way."""

    def __init__(self, samples: Mapping[str, bytes], delay_s: float) -> None:
        super().__init__(samples)
        self._delay_s = delay_s
        self._lock = threading.Lock()
        self.under_way = 0
        self.most_under_way = 0

    def read(self, position: int) -> bytes:
        with self._lock:
            self.under_way += 1
            self.most_under_way = max(self.most_under_way, self.under_way)
        time.sleep(self._delay_s)
        with self._lock:
            self.under_way -= 1
        return super().read(position)


def make_samples(num_samples: int = 40) -> dict[str, bytes]:
    return {f"n{i % 3:02d}/{i:03d}.JPEG": bytes([i]) * (300 + 37 * i) for i in range(num_samples)}
