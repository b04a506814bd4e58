"""`fanfare jobs`: have the jobs run on the embedded stack; list them."""

from __future__ import annotations

import json
import os
from datetime import datetime
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from schemas.errors import InvalidInput
from stack.layout import home as home_at
from stack.options import HomeOption, JsonOption

app = typer.Typer(no_args_is_help=True, help="The Flink jobs of the embedded stack.")


@app.command()
def start(
    jobs: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[JOB]...",
            help="campaigns, delivery, webhook-ingest or delivery-critical (campaigns whose lane "
            "is critical need it). (default: all but delivery-critical)",
        ),
    ] = None,
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
    from stack.jobs import JOBS, STANDARD, start_jobs

    wrong = [name for name in jobs or () if name not in JOBS]
    if wrong:
        raise InvalidInput(f"there is no job {', '.join(wrong)}: expected {', '.join(JOBS)}")
    wide = os.environ.get("FANFARE_PARALLELISM") or "1"
    if not wide.isdigit() or int(wide) < 1:
        raise InvalidInput(f"FANFARE_PARALLELISM={wide}: expected a number from 1")
    console = Console(stderr=True)
    found = start_jobs(
        home_at(home),
        lambda line: console.print(line, highlight=False, soft_wrap=True),
        forget=forget_state,
        parallelism=int(wide),
        names=jobs or STANDARD,
    )
    if as_json:
        print(json.dumps(found))
        return
    for name, job_id in found.items():
        print(f"{name}  {job_id}")


@app.command("list")
def list_jobs(home: HomeOption = None, as_json: JsonOption = False) -> None:
    """The jobs that Flink knows: their states, checkpoints, and what went wrong last.

    Exit status 1 where a job has failed, restarts, or can't make checkpoints.
    """
    from stack.flink_jobs import checkpoints, jobs, last_failure, running_jobs

    where = home_at(home)
    alive = {job.id for job in running_jobs(where)}
    rows = []
    for job in jobs(where):
        made = checkpoints(where, job.id)
        why = made.failing if job.id in alive else ""
        if job.state not in ("RUNNING", "FINISHED", "CANCELED"):
            why = last_failure(where, job.id) or why
        rows.append(
            {
                "id": job.id,
                "name": job.name,
                "state": job.state,
                "checkpoints": made.completed,
                "checkpoints_failed": made.failed,
                "checkpoint_at": made.at.isoformat() if made.at is not None else None,
                "trouble": why.strip(),
            }
        )
    if as_json:
        print(json.dumps(rows))
    else:
        table = Table(box=None)
        for column in ("job", "state", "checkpoints", "newest", "id"):
            table.add_column(column)
        for row in rows:
            at = datetime.fromisoformat(str(row["checkpoint_at"])) if row["checkpoint_at"] else None
            newest = f"{at:%H:%M:%S} UTC" if at is not None else "-"
            count = f"{row['checkpoints']:,} ({row['checkpoints_failed']:,} failed)"
            table.add_row(str(row["name"]), str(row["state"]), count, newest, str(row["id"]))
        console = Console()
        console.print(table)
        for row in rows:
            if row["trouble"]:
                first = str(row["trouble"]).splitlines()[0][:500]
                console.print(f"{row['name']}: {first}", style="red", soft_wrap=True, markup=False)
    going_on = {row["name"] for row in rows if row["id"] in alive}
    if any(
        row["trouble"] if row["id"] in alive else row["state"] == "FAILED"
        for row in rows
        if row["id"] in alive or row["name"] not in going_on
    ):
        raise typer.Exit(1)
