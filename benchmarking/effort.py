"""How long to measure: what all scenarios are told."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Effort:
    """How long to measure. A scenario that does less than this says so in its rows' settings."""

    repeats: int = 5
    """Pairs of a comparison."""
    seconds: float = 4.0
    """Time for which each side of a pair is measured, at least; the warm-up comes before."""
    num_images: int = 2000
    """Size of the data set."""
    batch_size: int = 64
    """Images of a batch; the bars are for 64."""
    is_quick: bool = False
    """Whether counts that a scenario sets itself (epochs, keys) are cut down as well."""

    def __post_init__(self) -> None:
        for name, value in (
            ("repeats", self.repeats),
            ("num_images", self.num_images),
            ("batch_size", self.batch_size),
        ):
            if value < 1:
                raise ValueError(f"{name}: got {value}, expected 1 or more")
        if self.seconds < 0:
            raise ValueError(f"seconds: got {self.seconds}, expected 0 or more")


QUICK = Effort(repeats=3, seconds=1.5, num_images=500, is_quick=True)
"""For a look within minutes; too short for a verdict."""
