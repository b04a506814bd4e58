"""`fanfare jobs`: have the jobs run on the embedded stack; list them."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from schemas.errors import InvalidInput
from stack.layout import home as home_at

app = typer.Typer(no_args_is_help=True, help="The Flink jobs of the embedded stack.")

HomeOption = Annotated[
    Path | None,
    typer.Option("--home", help="The stack's folder. [default: $FANFARE_HOME, else ./.fanfare]"),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON line.")]


@app.command()
def start(
    home: HomeOption = None,
    as_json: JsonOption = False,
    forget_state: Annotated[
        bool,
        typer.Option(
            "--forget-state",
            help="Begin with an empty state: consents, caps and runs are forgotten.",
        ),
    ] = False,
) -> None:
    """Create topics and tables, submit the jobs that don't run, wait until all run.

    A job that ran here before goes on from its newest checkpoint or savepoint.
    """
    from stack.jobs import start_jobs

    wide = os.environ.get("FANFARE_PARALLELISM") or "1"
    if not wide.isdigit() or int(wide) < 1:
        raise InvalidInput(f"FANFARE_PARALLELISM={wide}: expected a number from 1")
    console = Console(stderr=True)
    found = start_jobs(
        home_at(home),
        lambda line: console.print(line, highlight=False, soft_wrap=True),
        forget=forget_state,
        parallelism=int(wide),
    )
    if as_json:
        print(json.dumps(found))
        return
    for name, job_id in found.items():
        print(f"{name}  {job_id}")


@app.command("list")
def list_jobs(home: HomeOption = None, as_json: JsonOption = False) -> None:
    """The jobs that Flink knows, with their states."""
    from stack.flink_jobs import jobs

    listed = jobs(home_at(home))
    if as_json:
        print(json.dumps([{"id": job.id, "name": job.name, "state": job.state} for job in listed]))
        return
    table = Table(box=None)
    for column in ("job", "state", "id"):
        table.add_column(column)
    for job in listed:
        table.add_row(job.name, job.state, job.id)
    Console().print(table)
