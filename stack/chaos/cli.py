"""`fanfare chaos`: kill and stop everything during campaigns, and count what that cost."""

from __future__ import annotations

import json
import secrets
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from stack.layout import home as home_at
from stack.options import HomeOption

app = typer.Typer(add_completion=False, help="Kill everything during campaigns; count the cost.")

SEEDS = 1_000_000


@app.command()
def chaos(
    seed: Annotated[
        int | None, typer.Option("--seed", min=0, help="Draws the schedule. (default: random)")
    ] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="A short schedule, of a few minutes.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the JSON line alone.")] = False,
    markdown: Annotated[
        Path | None, typer.Option("--markdown", help="Write the crash contract to this file.")
    ] = None,
    contract: Annotated[
        Path | None, typer.Option("--contract", help="Put it between the marks of this file.")
    ] = None,
    home: HomeOption = None,
) -> None:
    """Run campaigns, kill and stop every part of the stack, compare three records.

    The last line is JSON. Exit status 1 if a message was lost or came twice, more are unknown
    than were in flight, the records contradict each other, or sends did not flow again.
    """
    from stack.chaos.contract import around, rewrite, section
    from stack.chaos.ordeal import undergo
    from stack.chaos.report import line, shown

    if contract is not None:
        around(contract)  # a file that can't hold it is refused now, not in half an hour
    chosen = secrets.randbelow(SEEDS) if seed is None else seed
    console = Console(stderr=as_json)

    def tell(text: str) -> None:
        console.print(text, highlight=False, soft_wrap=True, markup=False)

    tell(f"seed {chosen}; the same again: make chaos SEED={chosen}")
    result = undergo(home_at(home), chosen, quick, tell)
    if not as_json:
        wide = Console(width=None if console.is_terminal else 180)
        wide.print(shown(result))
    if markdown is not None:
        markdown.write_text(section(result), encoding="utf-8")
    if contract is not None:
        rewrite(contract, result)
    tell(f"seed {chosen}")
    print(json.dumps(line(result)), flush=True)
    raise typer.Exit(0 if result.sound else 1)
