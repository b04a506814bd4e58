"""Processes named so that no other can be mistaken for them, and their end.

A pid alone is reused; a pid with the kernel's start tick and the boot it was counted from
is not. Linux only: it reads /proc.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

MARK = "_FANFARE_SUPERVISED"
"""The variable in every child's environment that names the home it serves."""


@dataclass(frozen=True, slots=True)
class Identity:
    """One process, now and for ever: pid, start in clock ticks since boot, boot id."""

    pid: int
    ticks: int
    boot: str

    def alive(self) -> bool:
        """Whether this very process runs; a zombie does not."""
        found = _stat(self.pid)
        return (
            found is not None
            and found[1] == self.ticks
            and found[0] != "Z"
            and self.boot == _boot_id()
        )

    def send(self, number: signal.Signals) -> bool:
        """Signal this process; False when it is gone."""
        if not self.alive():
            return False
        try:
            os.kill(self.pid, number)
        except ProcessLookupError:
            return False
        return True


def _boot_id() -> str:
    return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()


def _stat(pid: int) -> tuple[str, int] | None:
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        return None
    fields = text.rsplit(")", 1)[1].split()
    return fields[0], int(fields[19])


def identify(pid: int) -> Identity | None:
    """The identity of a running process; None when there is none with this pid."""
    found = _stat(pid)
    return Identity(pid, found[1], _boot_id()) if found and found[0] != "Z" else None


def marked(home: Path) -> list[Identity]:
    """Every process of this user that was started for this home, whoever its parent is now."""
    wanted = f"{MARK}={home}".encode()
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        # Processes end while they are listed, and other users' are not ours to read.
        with suppress(OSError):
            if wanted in (entry / "environ").read_bytes().split(b"\0"):
                identity = identify(int(entry.name))
                if identity is not None:
                    found.append(identity)
    return found


def wait_gone(identities: Iterable[Identity], timeout: timedelta) -> list[Identity]:
    """Wait until all are gone; those that are not by then are returned."""
    deadline = time.monotonic() + timeout.total_seconds()
    left = [identity for identity in identities if identity.alive()]
    while left and time.monotonic() < deadline:
        time.sleep(0.02)
        left = [identity for identity in left if identity.alive()]
    return left


def end(
    identities: Iterable[Identity],
    patience: timedelta = timedelta(seconds=3),
) -> list[Identity]:
    """SIGTERM, then SIGKILL for what is left after `patience`. Returns what even that left."""
    targets = list(identities)
    for identity in targets:
        identity.send(signal.SIGTERM)
        # A stopped process cannot end before it is continued.
        identity.send(signal.SIGCONT)
    left = wait_gone(targets, patience)
    for identity in left:
        identity.send(signal.SIGKILL)
    return wait_gone(left, timedelta(seconds=10))
