"""A source of samples that are in memory, for tests of what is packed."""

from __future__ import annotations

from collections.abc import Sequence

from concurrent_dataloader.formats.fields import Box


class ListedSource:
    """Samples ``c/0.jpg``, ``c/1.jpg`` and so on, of three classes in turn."""

    def __init__(self, payloads: Sequence[bytes], *, labelled: bool = True) -> None:
        self.payloads = list(payloads)
        self.classes: Sequence[str] | None = ["a", "b", "c"] if labelled else None
        self.label_space: str | None = None
        self.fail_at: int | None = None
        self.num_read = 0

    def __len__(self) -> int:
        return len(self.payloads)

    def name(self, position: int) -> str:
        return f"c/{position}.jpg"

    def label(self, position: int) -> int | None:
        return None if self.classes is None else position % 3

    def boxes(self, position: int) -> Sequence[Box]:
        return ()

    def size_bytes(self, position: int) -> int | None:
        return len(self.payloads[position])

    def read(self, position: int) -> bytes:
        if position == self.fail_at:
            raise ConnectionError(f"c/{position}.jpg: gone")
        self.num_read += 1
        return self.payloads[position]

    def close(self) -> None:
        return
