"""`fanfare audience`: build, show and verify audience snapshots; generate profiles to try."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeElapsedColumn,
)
from rich.table import Table
from rich.text import Text

from schemas.errors import FanfareError, MissingSnapshot
from schemas.snapshot import Manifest
from sinks.store import FileStore
from stack.options import JsonOption
from stack.profiles import generate as generate_profiles

app = typer.Typer(
    no_args_is_help=True, help="Audience snapshots: who a campaign may write to.", name="audience"
)
_errors = Console(stderr=True)

StoreOption = Annotated[
    Path, typer.Option("--store", envvar="FANFARE_STORE", help="Folder of snapshots and objects.")
]
DEFAULT_STORE = Path(".fanfare/store")


class TaskRate(ProgressColumn):
    """Rows a second."""

    def render(self, task: Task) -> Text:
        """The rate of a task, empty before it is known."""
        speed = task.finished_speed or task.speed
        return Text(f"{speed:,.0f}/s" if speed else "")


@contextmanager
def _told() -> Iterator[None]:
    """Errors that Fanfare raises on purpose, as one line and exit status 1."""
    try:
        yield
    except FanfareError as error:
        told = escape(str(error))
        _errors.print(f"[red]error:[/red] {told}", soft_wrap=True, highlight=False)
        raise typer.Exit(1) from error


@app.command()
def build(
    files: Annotated[list[Path], typer.Argument(help="CSV and Parquet files of profiles.")],
    segment: Annotated[
        str, typer.Option(help="Who is in, such as: age >= 18 and country in ('DE', 'AT').")
    ] = "",
    tenant: Annotated[str, typer.Option(help="Whose people they are.")] = "default",
    store: StoreOption = DEFAULT_STORE,
    rejects: Annotated[
        Path | None, typer.Option(help="Where to write refused rows, with row and reason (CSV).")
    ] = None,
    default_zone: Annotated[
        str, typer.Option(help="IANA time zone of people without one; unknown if not given.")
    ] = "",
    as_json: JsonOption = False,
) -> None:
    """Build the snapshot of an audience: checked, selected, one row a person, in pages."""
    # Beam takes a second to import; the other commands need not wait for it.
    from pipelines.audience import AudienceRequest, build_audience

    request = AudienceRequest(tuple(files), tenant, segment, default_zone, rejects)
    started = time.monotonic()
    with (
        _told(),
        Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=20),
            TextColumn("{task.completed:,.0f} rows"),
            TaskRate(),
            TimeElapsedColumn(),
            console=_errors,
            disable=not _errors.is_terminal,
        ) as progress,
    ):
        phases = {
            "read": progress.add_task("read, check, select", total=None),
            "page": progress.add_task("sort and page", total=None, start=False),
        }

        def tell(phase: str, rows: int) -> None:
            progress.start_task(phases[phase])
            progress.advance(phases[phase], rows)

        built = build_audience(request, FileStore(store), tell)
    seconds = time.monotonic() - started
    if as_json:
        told = {"snapshot": built.snapshot, "seconds": round(seconds, 3)}
        typer.echo(json.dumps(told | asdict(built.manifest.counts)))
        return
    _print(built.snapshot, built.manifest)
    rate = built.manifest.counts.read / seconds
    typer.echo(f"{seconds:.1f} s, {rate:,.0f} rows/s")
    if built.manifest.counts.rejected:
        where = f"in {rejects}" if rejects else "with --rejects FILE"
        typer.echo(f"{built.manifest.counts.rejected:,} rows were refused; see why {where}")


@app.command()
def show(
    snapshot: Annotated[str, typer.Argument(help="The id, or its beginning.")],
    store: StoreOption = DEFAULT_STORE,
    as_json: JsonOption = False,
) -> None:
    """Show what a snapshot holds."""
    with _told():
        opened = FileStore(store).open_snapshot(_full_id(snapshot, store))
    manifest = opened.manifest
    if as_json:
        plain = json.loads(manifest.to_bytes())
        plain["pages"] = len(manifest.pages)
        typer.echo(json.dumps({"snapshot": opened.id, **plain}, ensure_ascii=False))
        return
    _print(opened.id, manifest)
    for zone, count in sorted(manifest.zones.items(), key=lambda one: (-one[1], one[0])):
        typer.echo(f"  {count:>12,}  {zone or '(unknown zone)'}")


@app.command()
def verify(
    snapshot: Annotated[str, typer.Argument(help="The id, or its beginning.")],
    store: StoreOption = DEFAULT_STORE,
) -> None:
    """Read every page of a snapshot and compare it with the manifest."""
    with _told():
        opened = FileStore(store).open_snapshot(_full_id(snapshot, store))
        damages = list(opened.verify())
    for damage in damages:
        _errors.print(f"[red]damaged:[/red] {escape(str(damage))}", soft_wrap=True, highlight=False)
    if damages:
        raise typer.Exit(1)
    typer.echo(f"{opened.id}: {len(opened.manifest.pages):,} pages are as they were written")


@app.command()
def generate(
    out: Annotated[Path, typer.Option(help="File to write: .csv or .parquet.")],
    people: Annotated[int, typer.Option(min=1, help="How many distinct people.")] = 100_000,
    seed: Annotated[int, typer.Option(help="The same seed gives the same file.")] = 1,
) -> None:
    """Write made-up profiles: names of every script, 30 zones, duplicates, bad rows."""
    rows = generate_profiles(people, seed, out)
    typer.echo(f"{out}: {rows:,} rows of {people:,} people")


def _full_id(beginning: str, store: Path) -> str:
    """The one snapshot whose id begins so; the text itself if that is none or several."""
    found = [one for one in FileStore(store).snapshots() if one.startswith(beginning)]
    if len(found) > 1 and beginning:
        raise MissingSnapshot(f"{beginning} is the beginning of {', '.join(found)}: give more")
    return found[0] if beginning and found else beginning


def _print(snapshot: str, manifest: Manifest) -> None:
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column()
    table.add_column(justify="right")
    counts = manifest.counts
    table.add_row("read", f"{counts.read:,}")
    table.add_row("rejected", f"{counts.rejected:,}")
    table.add_row("duplicates", f"{counts.duplicates:,}")
    table.add_row("not selected", f"{counts.not_selected:,}")
    table.add_row("[bold]audience[/bold]", f"[bold]{counts.audience:,}[/bold]")
    table.add_row("pages", f"{len(manifest.pages):,}")
    table.add_row("zones", f"{len(manifest.zones):,}")
    Console().print(f"snapshot [bold]{snapshot}[/bold]", highlight=False)
    Console().print(table)
