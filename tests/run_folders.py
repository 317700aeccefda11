"""What tests read in folders of runs, and how they wait for it."""

import json
import time
from pathlib import Path


def hashes(folder: Path) -> dict[str, str]:
    files = sorted(folder.glob("*/epoch-*.json"))
    return {f"{file.parent.name}/{file.name}": json.loads(file.read_text())["weights_sha256"] for file in files}


def wait_for(condition, seconds: float = 180.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.05)
