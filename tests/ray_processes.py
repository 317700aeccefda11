"""Processes of a Ray cluster that a test started."""

import contextlib
import os
from pathlib import Path


def workers_at_a_task(session: int, task: str) -> list[int]:
    """Worker processes of a Ray cluster of this session that run `task` now."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                command = (entry / "cmdline").read_bytes()
                if command.startswith(f"ray::{task}".encode()) and os.getsid(int(entry.name)) == session:
                    found.append(int(entry.name))
    return found


def processes_of(session: int) -> list[int]:
    """Every process of a session that has not ended."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                alive = (entry / "stat").read_text().rpartition(")")[2].split()[0] != "Z"
                if alive and os.getsid(int(entry.name)) == session:
                    found.append(int(entry.name))
    return found
