"""Options that many commands have."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

HomeOption = Annotated[
    Path | None,
    typer.Option("--home", help="The stack's folder. (default: $FANFARE_HOME, else ./.fanfare)"),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON line.")]
