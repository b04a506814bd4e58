"""How many request slots delivery processes have in use, for others to see.

Each delivery process keeps its counts in a small file that it maps into memory: writing one costs
no system call, and what was written outlives a process that is killed at the next instruction. A
slot is in use from before the claim until after the settle, so what a kill leaves in doubt is at
most what the file says.
"""

from __future__ import annotations

import mmap
import os
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from schemas.errors import Unavailable

_CELLS = 64
_SIZE = _CELLS * 8
"""A count a cell, 8 bytes each, in the machine's order: it is read on the same machine."""


class SlotBoard:
    """The counts of one engine: a cell an account. The file is ``FOLDER/PID-N``.

    Raises:
        Unavailable: the folder can't be written.
    """

    def __init__(self, folder: Path) -> None:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            _sweep(folder)
            self._path = folder / f"{os.getpid()}-{time.monotonic_ns()}"
            with self._path.open("xb+") as file:
                file.truncate(_SIZE)
                self._map = mmap.mmap(file.fileno(), _SIZE)
        except OSError as error:
            raise Unavailable(
                f"the counts of request slots can't be kept in {folder} (FANFARE_SLOTS): {error}"
            ) from error
        self._cells = memoryview(self._map).cast("Q")
        self._next = 0

    def cell(self) -> Callable[[int], None]:
        """Where the count of one more account is put."""
        cells, at = self._cells, self._next
        if at >= _CELLS:
            raise ValueError(f"a process has at most {_CELLS} accounts")
        self._next += 1

        def put(count: int) -> None:
            cells[at] = count

        return put

    def close(self) -> None:
        """Take the file away if nothing is in use any more; else it stays for whoever counts."""
        if not any(self._cells):
            self._path.unlink(missing_ok=True)


def in_use(folder: Path, pid: int) -> int:
    """The slots that a process has in use, all its accounts and engines together.

    0 where it never had any. To count exactly what a kill leaves, stop the process first.
    """
    return sum(_count(path) for path in folder.glob(f"{pid}-*"))


def _count(path: Path) -> int:
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return 0
    return sum(memoryview(data[: len(data) // 8 * 8]).cast("Q"))


def _sweep(folder: Path) -> None:
    """Take away what processes that are gone have left."""
    for path in folder.iterdir():
        pid = path.name.partition("-")[0]
        if not pid.isdigit() or _alive(int(pid)):
            continue
        with suppress(FileNotFoundError):
            path.unlink()


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
