"""What all figures share: matplotlib without a screen, and a caption below."""

from __future__ import annotations

import pathlib
import textwrap
from typing import TYPE_CHECKING, Any

from concurrent_dataloader.errors import MissingDependencyError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

OURS, TORCH, MEMORY = "#1b6ca8", "#c0504d", "#7f7f7f"


def open_figure(width_inches: float, height_inches: float) -> Figure:
    """Make a figure that needs no screen and no state of pyplot's.

    Raises:
        MissingDependencyError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingDependencyError(
            f"plots: {error}; run `pip install 'concurrent-dataloader[plots]'`"
        ) from error
    return Figure(figsize=(width_inches, height_inches), layout="constrained", dpi=150)


def finish_axes(axes: Any) -> None:
    """Take away what says nothing."""
    axes.spines[["top", "right"]].set_visible(False)


def save(figure: Figure, caption: str, path: pathlib.Path) -> pathlib.Path:
    """Write the caption below the figure, and the figure to a PNG file."""
    num_columns = int(figure.get_figwidth() * 14.5)
    figure.supxlabel(
        "\n".join(textwrap.wrap(caption, num_columns)), fontsize=8.5, x=0.01, ha="left"
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    return path
