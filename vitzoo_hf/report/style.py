"""How figures look: colours, headings, names of metrics."""

from typing import Any

import numpy as np
import pandas as pd
from matplotlib import colormaps
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

# Okabe and Ito's colours, which the common forms of colour blindness keep apart.
PALETTE = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#8C6BB1", "#6B7280")
INK, MUTED, FAINT = "#1f2430", "#6b7280", "#e5e7eb"
STYLE: dict[Any, Any] = {"axes.edgecolor": "#9ca3af", "axes.labelcolor": INK, "axes.grid": True}
STYLE |= {"axes.spines.top": False, "axes.spines.right": False, "axes.titlelocation": "left"}
STYLE |= {"font.family": "DejaVu Sans", "font.size": 9, "axes.titlesize": 10, "axes.titleweight": "bold"}
STYLE |= {"text.color": INK, "grid.color": FAINT, "xtick.color": "#4b5563", "ytick.color": "#4b5563"}
STYLE |= {"legend.frameon": False, "text.parse_math": False, "hatch.linewidth": 0.6, "axes.axisbelow": True}
PERCENT = FuncFormatter(lambda value, _: f"{100 * value:.4g} %")
NAMES = {
    "agreement": "agreement (share of test images with the same prediction)",
    "cka": "CKA of features on test images (debiased)",
    "weight_l2": "distance of trunk weights (L2)",
    "weight_cosine": "cosine of trunk weights",
}


def short(text: str, length: int = 18) -> str:
    """The text, cut to `length` characters."""
    return text if len(text) <= length else text[: length - 1] + "…"


def colours_of(level: pd.Series, shift: int = 0) -> dict[str, Any]:
    """Level -> colour: a ramp where order means something, else separate hues; `shift` tells factors apart."""
    names = [name for name in level.cat.categories if (level == name).any()]
    if len(names) > len(PALETTE) or (level.cat.ordered and len(names) > 2):
        ramp = colormaps[("viridis", "magma", "cividis")[shift % 3]](np.linspace(0.1, 0.82, len(names)))
        return dict(zip(names, ramp, strict=True))
    return {name: PALETTE[(i + 2 * shift) % len(PALETTE)] for i, name in enumerate(names)}


def heading(figure: Figure, title: str, subtitle: str) -> None:
    """A bold title and grey lines below it; blank lines in the title keep their place in the layout."""
    width, height = map(float, figure.get_size_inches())
    title += "\n" * (subtitle.count("\n") + 1)
    figure.suptitle(title, x=0.08 / width, ha="left", fontsize=12.5, weight="bold")
    figure.text(0.08 / width, 1 - 0.3 / height, subtitle, va="top", color=MUTED, linespacing=1.35)
