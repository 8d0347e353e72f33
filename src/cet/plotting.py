"""How plots look, and how they become PNG files."""

from __future__ import annotations

import io
from typing import Any

from matplotlib.figure import Figure

GREY = "#666666"

STYLE: Any = {
    "font.size": 10.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": GREY,
    "axes.axisbelow": True,
    "axes.titlesize": 12,
    "xtick.color": GREY,
    "ytick.color": GREY,
    "grid.color": "#e8e8e8",
    "legend.frameon": False,
}


def png(figure: Figure) -> bytes:
    """The content of a PNG file."""
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=150)
    return content.getvalue()
