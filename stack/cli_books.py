"""`fanfare books`: a run's books, whether they balance, and one recipient's story."""

from __future__ import annotations

import json
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from schemas import topics
from schemas.errors import FanfareError, InvalidInput
from schemas.tables import StepKind
from sinks.books import Books, read_books, run_facts
from sinks.clickhouse import connect
from sinks.ingest_lag import records_behind
from sinks.store import FileStore
from sinks.story import Story, read_story
from stack.options import HomeOption, JsonOption
from stack.reach import reach, variable

app = typer.Typer(add_completion=False, help="A run's books, and one recipient's story.")
_console = Console()
_errors = Console(stderr=True)

INGESTED = (
    topics.PAGE_RESULTS,
    topics.OUTCOMES,
    topics.RUNS,
    topics.WEBHOOKS_RAW,
    topics.DEAD_LETTERS,
)
DEFAULT_GROUP = "fanfare-webhook-ingest"
_UNBALANCED = 1
_FAILED = 2


@app.command()
def books(
    run: Annotated[str, typer.Argument(metavar="RUN", help="The run's name.")],
    tenant: Annotated[str, typer.Option("--tenant", help="Whose run it is.")] = "default",
    as_json: JsonOption = False,
    recipient: Annotated[
        str | None, typer.Option("--recipient", metavar="ID", help="Tell one recipient's story.")
    ] = None,
    watch: Annotated[
        bool, typer.Option("--watch", help="Show again each second until all is settled.")
    ] = False,
    home: HomeOption = None,
) -> None:
    """Print the books of a run. Exit status 1 if they do not balance, 2 if they can't be read."""
    try:
        if recipient is not None:
            _tell(run, tenant, recipient, as_json, home)
            return
        found = _watch(run, tenant, home) if watch else look(run, tenant, home)
    except FanfareError as error:
        _errors.print(f"[red]error:[/red] {escape(str(error))}", soft_wrap=True, highlight=False)
        raise typer.Exit(_FAILED) from None
    if as_json:
        typer.echo(json.dumps(found.as_json()))
    elif not watch:
        _console.print(shown(found))
    if not found.verdict.balanced:
        raise typer.Exit(_UNBALANCED)


def look(run: str, tenant: str = "default", home: Path | None = None) -> Books:
    """Read a run's books from the servers that the environment or the stack of ``home`` names.

    Raises:
        Missing: no such run.
        Unavailable: ClickHouse or Kafka.
        InvalidInput: a server is not named.
    """
    settings = reach(home)
    client = connect(variable("FANFARE_CLICKHOUSE", home))
    behind = None
    try:
        if settings.get("FANFARE_KAFKA"):
            # Before the tables are read: what is taken in by then is in them or in the buffers.
            prefix = settings.get("FANFARE_TOPIC_PREFIX", "")
            behind = records_behind(
                settings["FANFARE_KAFKA"],
                settings.get("FANFARE_INGEST_GROUP", DEFAULT_GROUP),
                [prefix + topic for topic in INGESTED],
            )
        return read_books(client, tenant, run, datetime.now(UTC), behind)
    finally:
        client.close()


def settled(found: Books) -> bool:
    """Whether nothing of the run is to be expected any more, but for late webhooks."""
    terminal = found.status in ("completed", "cancelled", "expired", "refused")
    return terminal and found.counts.pending == 0 and bool(found.lag.caught_up)


def _watch(run: str, tenant: str, home: Path | None) -> Books:
    with Live(console=_console, auto_refresh=False) as live:
        while True:
            found = look(run, tenant, home)
            live.update(shown(found), refresh=True)
            if settled(found):
                return found
            time.sleep(1)


def shown(found: Books) -> RenderableType:
    """The books for people."""
    counts = found.counts
    table = Table(
        title=f"{found.run} - {found.campaign}, {found.status}", title_justify="left", box=None
    )
    table.add_column("")
    table.add_column("recipients", justify="right")
    table.add_column("share", justify="right", style="dim")

    def row(name: str, number: int, style: str = "") -> None:
        share = f"{number / counts.audience:.1%}" if counts.audience else ""
        table.add_row(Text(name, style=style), Text(f"{number:,}", style=style), share)

    row("audience", counts.audience, "bold")
    row("accepted", counts.of(StepKind.ACCEPTED), "green")
    for kind in (
        StepKind.SKIPPED,
        StepKind.FAILED,
        StepKind.EXPIRED,
        StepKind.CANCELLED,
        StepKind.UNKNOWN,
    ):
        row(kind.name.lower(), counts.of(kind))
        for reason, number in counts.reasons(kind).items():
            row(f"  {reason.replace('_', ' ')}", number, "dim")
    row("pending", counts.pending)
    row("delivered", found.delivered, "cyan")
    lines: list[RenderableType] = [table]
    if found.dead_letters:
        told = ", ".join(f"{reason} {number:,}" for reason, number in found.dead_letters.items())
        lines.append(Text(f"dead letters: {told}", style="yellow"))
    lines.append(Text(_lag(found), style="dim"))
    if found.verdict.balanced:
        lines.append(Text("The books balance.", style="bold green"))
    else:
        lines.append(Text("The books do not balance:", style="bold red"))
        lines += [Text(f"  {error}", style="red") for error in found.verdict.errors]
    return Group(*lines)


def _lag(found: Books) -> str:
    lag = found.lag
    if lag.newest is None or lag.age is None:
        return "lag: nothing was ingested yet; is the webhook-ingest job running?"
    age = f"newest record {lag.newest:%H:%M:%S} UTC, {lag.age.total_seconds():,.1f} s ago"
    behind = "unknown" if lag.behind is None else f"{lag.behind:,} records in Kafka"
    return f"lag: {behind}, {lag.buffered:,} buffered; {age}"


def _tell(run: str, tenant: str, recipient: str, as_json: bool, home: Path | None) -> None:
    client = connect(variable("FANFARE_CLICKHOUSE", home))
    try:
        facts = run_facts(client, tenant, run)
        if not facts.snapshot:
            raise InvalidInput(f"run {run!r} names no snapshot: it was refused at launch")
        snapshot = FileStore(variable("FANFARE_STORE", home)).open_snapshot(facts.snapshot)
        story = read_story(client, tenant, run, facts, snapshot, recipient)
    finally:
        client.close()
    if as_json:
        typer.echo(json.dumps(story.as_json()))
    else:
        _console.print(shown_story(story))


def shown_story(story: Story) -> RenderableType:
    """A story for people."""
    table = Table(
        title=f"{story.recipient}: shard {story.shard}, ordinal {story.ordinal}",
        title_justify="left",
        box=None,
    )
    for column in ("time (UTC)", "leg", "generation", "what", "reason", "detail"):
        table.add_column(column)
    for one in story.moments:
        table.add_row(
            f"{one.at:%Y-%m-%d %H:%M:%S.%f}"[:-3],
            one.leg,
            "" if one.generation < 0 else str(one.generation),
            Text(one.what),
            Text(one.reason),
            Text(", ".join(f"{name} {value}" for name, value in one.detail.items())),
        )
    ends = [
        Text(f"{leg}: {name}{f' ({reason})' if reason else ''}", style="bold")
        for leg, (name, reason) in story.classes.items()
    ]
    return Group(table, *ends)
