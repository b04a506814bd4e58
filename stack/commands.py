"""The commands of the stack itself: up, down, status, env."""

from __future__ import annotations

import json
import shlex
import sys
import time
from typing import Annotated

import typer
from rich.console import Console
from rich.live import Live
from rich.table import Table

from stack import lifecycle
from stack.layout import Home, StackState, State, endpoints, environment, processes
from stack.layout import home as home_at
from stack.options import HomeOption, JsonOption

up_app = typer.Typer(add_completion=False)
down_app = typer.Typer(add_completion=False)
status_app = typer.Typer(add_completion=False)
env_app = typer.Typer(add_completion=False)


COLOURS = {
    State.READY.value: "green",
    State.FAILING.value: "red",
    State.STARTING.value: "yellow",
    "suspended": "magenta",
    "unsupervised": "red",
}

SERVED_BY = {"flink": "flink-jobmanager", "sendgrid": "simulator", "smtp": "simulator"}
"""The service behind an endpoint, where their names differ."""


def _coloured(state: str) -> str:
    return f"[{COLOURS.get(state, 'dim')}]{state}[/]"


@up_app.command()
def up(
    home: HomeOption = None,
    only: Annotated[
        str,
        typer.Option(help="Comma-separated services, `flink` for all of Flink's. (default: all)"),
    ] = "",
    taskmanagers: Annotated[
        int | None,
        typer.Option(
            min=1, help=f"One-slot TaskManagers. (default: {lifecycle.DEFAULT_TASKMANAGERS})"
        ),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Start the embedded stack and wait until every server is ready. Twice is harmless."""
    where = home_at(home)
    chosen = tuple(name.strip() for name in only.split(",") if name.strip())
    began = time.monotonic()
    if as_json:
        lifecycle.up(where, chosen, taskmanagers)
        found = {
            "home": str(where.root),
            "seconds": round(time.monotonic() - began, 1),
            "services": [s.as_json() for s in lifecycle.status(where)],
            "endpoints": endpoints(where).shown(),
        }
        print(json.dumps(found))
        return
    console = Console()
    if console.is_terminal:
        with Live(console=console, refresh_per_second=8) as live:
            state = lifecycle.up(where, chosen, taskmanagers, lambda s: live.update(_progress(s)))
            live.update(_progress(state))
    else:
        lifecycle.up(where, chosen, taskmanagers, _Lines(console))
    console.print(f"The stack is up after {time.monotonic() - began:.1f} s, in {where.root}")
    _print_endpoints(console, where)


def _progress(state: StackState) -> Table:
    table = Table(box=None, pad_edge=False)
    for heading in ("service", "state", "ready after", "port"):
        table.add_column(heading)
    for info in state.services.values():
        took = f"{info.ready_after_s:.1f} s" if info.ready_after_s is not None else ""
        ports = ", ".join(map(str, info.ports.values()))
        why = f" {info.why}" if info.why else ""
        table.add_row(info.name, f"{_coloured(info.state.value)}{why}", took, ports)
    return table


class _Lines:
    """Progress for what is no terminal: one line for each service that got ready."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._told: set[str] = set()

    def __call__(self, state: StackState) -> None:
        for info in state.services.values():
            if info.state is State.READY and info.name not in self._told:
                self._told.add(info.name)
                self._console.print(f"{info.name} ready after {info.ready_after_s} s")


def _print_endpoints(console: Console, where: Home) -> None:
    table = Table(box=None, pad_edge=False, show_header=False)
    for name, url in endpoints(where).shown().items():
        if SERVED_BY.get(name, name) in processes(where):
            table.add_row(name, url)
    console.print(table)
    console.print("The variables for jobs and tools: fanfare env", highlight=False)


@down_app.command()
def down(home: HomeOption = None) -> None:
    """Stop every server of the stack and make sure that no process remains."""
    where = home_at(home)
    began = time.monotonic()
    stopped = lifecycle.down(where)
    if stopped:
        print(f"Stopped {', '.join(stopped)} in {time.monotonic() - began:.1f} s")
    else:
        print(f"Nothing was running in {where.root}")


@status_app.command()
def status(home: HomeOption = None, as_json: JsonOption = False) -> None:
    """Show every server: state, pid, ports, restarts, memory, CPU, log. Status 1 unless all
    are ready."""
    where = home_at(home)
    found = lifecycle.status(where)
    if as_json:
        print(json.dumps([s.as_json() for s in found], indent=1))
    elif not found:
        print(f"No stack was started in {where.root}; run `fanfare up`")
    else:
        table = Table(box=None, pad_edge=False)
        for heading in ("service", "state", "pid", "ports", "up", "restarts", "MB", "CPU %"):
            table.add_column(heading, overflow="fold")
        for s in found:
            table.add_row(
                s.name,
                _coloured(s.state) + (f" {s.why}" if s.why else ""),
                str(s.pid or ""),
                ", ".join(map(str, s.ports.values())),
                f"{s.uptime_s:.0f} s" if s.uptime_s is not None else "",
                str(s.restarts),
                f"{s.rss_mb:.0f}" if s.rss_mb is not None else "",
                f"{s.cpu_percent:.1f}" if s.cpu_percent is not None else "",
            )
        console = Console()
        console.print(table)
        console.print(f"Logs: {where.logs}/NAME.log", highlight=False)
    if not found or any(s.state != State.READY.value for s in found):
        sys.exit(1)


@env_app.command()
def env(home: HomeOption = None) -> None:
    """Print `export` lines for a shell: eval "$(fanfare env)". They hold secrets."""
    for name, value in environment(home_at(home)).items():
        print(f"export {name}={shlex.quote(value)}")
