"""Progress for people: bars on standard error."""

import sys

from tqdm import tqdm


def progress_bar(description: str, unit: str, *, shown: bool, total: int | None = None, done: int = 0) -> tqdm:
    """A bar with the time left on standard error; a line every ten seconds where that is not a terminal."""
    pace = 0.1 if sys.stderr.isatty() else 10.0
    return tqdm(
        desc=description, unit=unit, total=total, initial=done, disable=not shown, smoothing=0.05, mininterval=pace
    )
