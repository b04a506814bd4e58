"""The operator under the real engine, in a process of its own.

A Flink in this process would put its own operations in place of Beam's, for good.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ALONE = Path(__file__).with_name("operator_alone.py")


@pytest.mark.engine
def test_the_operator_under_the_engine() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(ALONE)],
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
        cwd=ALONE.parents[2],
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
