"""Draw a slice of the loss landscape."""

from collections.abc import Sequence
from pathlib import Path

from matplotlib import rc_context
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from vitzoo_hf.apply.paths.landscape import LandscapeSlice
from vitzoo_hf.format.schema import ZooError
from vitzoo_hf.report.style import INK, STYLE


def draw_slice(slice: LandscapeSlice, path: str | Path, *, title: str, names: Sequence[str] | None = None) -> Path:
    """Draw loss (log scale) and accuracy side by side as a PNG, with the three rows marked.

    Args:
        slice: result of `landscape_slice`.
        path: file to write.
        title: title of the figure.
        names: labels of the three rows; by default their ids.

    Raises:
        ZooError: if the file cannot be written.
    """
    with rc_context(STYLE):
        figure = Figure(figsize=(9, 3.9), layout="constrained")
        # no pyplot: it keeps every figure alive, and may want a display
        FigureCanvasAgg(figure)
        figure.suptitle(title, fontsize=11, weight="bold")
        panels = (
            # a linear scale shows only the walls: losses of one slice span orders of magnitude
            ("log10 of cross-entropy", slice.loss.log10(), "viridis_r"),
            ("accuracy", slice.accuracy, "viridis"),
        )
        for axes, (label, values, colours) in zip(figure.subplots(1, 2), panels, strict=True):
            contours = axes.contourf(slice.x.numpy(), slice.y.numpy(), values.numpy(), 24, cmap=colours)
            figure.colorbar(contours, ax=axes, label=label)
            axes.plot(*slice.corners.T.numpy(), "o", color="white", markeredgecolor=INK)
            for corner, name in zip(slice.corners.tolist(), names or slice.model_ids, strict=True):
                axes.annotate(name, corner, (4, 5), textcoords="offset points", fontsize=7, color="white")
            axes.grid(False)
            # equal aspect: both axes are L2 distances, so angles between models are true
            axes.set(xlabel="L2 distance", ylabel="L2 distance", aspect="equal")
        try:
            figure.savefig(path, dpi=110)
        except OSError as error:
            raise ZooError(f"cannot write {path}: {error.strerror}; give another place") from None
    return Path(path)
