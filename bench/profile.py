"""Where delivery's loop spends its time: ``python -m bench.profile``, half a minute.

Runs ``bench.delivery`` under py-spy, which looks 500 times a second at who holds the interpreter's
lock, and adds the samples of the loop's thread up by part. The shares go to
``bench/profiles/loop-smtp.txt``, with the dearest lines.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from bench.harness import RESULTS, machine

FOLDER = RESULTS.with_name("profiles")
PARTS: Mapping[str, Sequence[str]] = {
    "writing to the provider (the system call)": ("Wire.write",),
    "rendering": ("<template", "rendering.py", "jinja2", "markupsafe"),
    "MIME": ("mime.py", "providers/smtp.py", "providers/sendgrid.py"),
    "links, identifiers, personal data": ("personalise.py", "unsubscribe.py", "ids.py"),
    "pages": ("store.py", "snapshot.py", "delivery_pages.py"),
    "the rest of the provider's client": ("smtp_client.py", "http1.py", "connections.py"),
    "ledger, tokens, the client of Redis": ("ledger", "redis", "shaping"),
    "the loop's own decisions": ("delivery_loop", "delivery_work", "permits", "message.py"),
}
"""By what a frame's name has; the innermost frame that is of a part decides."""
REST = "the event loop"
_LOOP = "sinks/engine.py"


def parts(stacks: Iterable[str]) -> tuple[Counter[str], Counter[str]]:
    """Samples by part and by line, of collapsed stacks: ``frame;frame;… count``."""
    by_part: Counter[str] = Counter()
    by_line: Counter[str] = Counter()
    for line in stacks:
        stack, _, count = line.rpartition(" ")
        frames = stack.split(";")
        if any(_LOOP in frame for frame in frames):
            by_part[_part(frames)] += int(count)
            by_line[frames[-1]] += int(count)
    return by_part, by_line


def _part(frames: Sequence[str]) -> str:
    for frame in reversed(frames):
        for part, marks in PARTS.items():
            if any(mark in frame for mark in marks):
                return part
    return REST


def _recorded(kind: str) -> list[str]:
    with tempfile.TemporaryDirectory(prefix="fanfare-bench-") as folder:
        raw = Path(folder) / "raw"
        subprocess.run(
            [
                *(str(Path(sys.executable).with_name("py-spy")), "record", "--gil"),
                *("--rate", "500", "--format", "raw", "--output", str(raw), "--"),
                *(sys.executable, "-m", "bench.delivery", "--only", kind, "--people", "120000"),
            ],
            check=True,
            stdout=sys.stderr,
            cwd=RESULTS.parent.parent,
        )
        return raw.read_text().splitlines()


def main() -> int:
    """Record, print, keep."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.profile",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("kind", nargs="?", choices=("smtp", "http"), default="smtp")
    options = parser.parse_args()
    by_part, by_line = parts(_recorded(options.kind))
    total = by_part.total()
    where = machine()
    told = [
        f"delivery's loop, {options.kind}: share of {total:,} samples with the interpreter's lock",
        f"{where['fanfare']}, Python {where['python']}, uvloop {where['uvloop']}",
        "",
    ]
    told += [f"{count / total:6.1%}  {part}" for part, count in by_part.most_common()]
    told += ["", "dearest lines"]
    told += [f"{count / total:6.1%}  {line}" for line, count in by_line.most_common(12)]
    FOLDER.mkdir(exist_ok=True)
    (FOLDER / f"loop-{options.kind}.txt").write_text("\n".join(told) + "\n", encoding="utf-8")
    print("\n".join(told))
    return 0


if __name__ == "__main__":
    sys.exit(main())
