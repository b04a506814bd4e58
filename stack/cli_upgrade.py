"""`fanfare upgrade`: put the installed code, or another parallelism, into the running jobs."""

from __future__ import annotations

import json
from typing import Annotated

import typer
from rich.console import Console

from schemas.errors import InvalidInput
from stack.layout import home as home_at
from stack.options import HomeOption

app = typer.Typer(
    add_completion=False, help="New code into running jobs, in the middle of campaigns."
)


@app.command()
def upgrade(
    parallelism: Annotated[
        list[str] | None,
        typer.Option("--parallelism", help="JOB=N: rescale a job, such as delivery=2. Repeatable."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON line.")] = False,
    home: HomeOption = None,
) -> None:
    """Stop the jobs behind savepoints, restart TaskManagers, go on with the installed code."""
    from stack.jobs import JOBS
    from stack.upgrade import upgrade as run_upgrade

    wanted: dict[str, int] = {}
    for one in parallelism or []:
        name, _, number = one.partition("=")
        if name not in JOBS or not number.isdigit() or int(number) < 1:
            raise InvalidInput(
                f"--parallelism {one}: expected JOB=N, N from 1, JOB one of {', '.join(JOBS)}"
            )
        wanted[name] = int(number)
    console = Console(stderr=True)
    done = run_upgrade(
        home_at(home), lambda line: console.print(line, highlight=False, soft_wrap=True), wanted
    )
    if as_json:
        print(json.dumps(done))
        return
    for name, job_id in done.items():
        print(f"{name}  {job_id}")
