"""`fanfare campaign`: launch, schedule, pause, resume, cancel, rate, status."""

from __future__ import annotations

import getpass
import json
import time
import uuid
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from schemas import topics
from schemas.codec import decode, encode
from schemas.errors import CorruptPage, InvalidCampaign, MalformedRecord, Unavailable
from schemas.ids import ObjectId, RunId, Tenant
from schemas.pages import bitmap_bytes, bitmap_from, full_bitmap
from schemas.records import (
    CampaignSpec,
    Command,
    CommandKind,
    ConsentChange,
    LegSpec,
    PageOrder,
    RunEvent,
)
from schemas.snapshot import PageBody
from sinks.store import FileStore, Snapshot
from stack.operators import readable
from stack.options import HomeOption, JsonOption
from stack.reach import topic_prefix, variable
from transforms.campaign_file import parse_campaign, read_moment
from transforms.examine import misfits, unrenderable
from transforms.rendering import TemplateSource, compile_template

app = typer.Typer(no_args_is_help=True, help="Campaigns: launch them and control them.")
_errors = Console(stderr=True)

TenantOption = Annotated[str, typer.Option("--tenant", help="Whose campaign it is.")]
WaitOption = Annotated[
    float, typer.Option("--wait", help="Seconds to wait for the answer; 0: don't wait.")
]
RunArgument = Annotated[str, typer.Argument(metavar="RUN", help="The run's name.")]


def read_campaign(
    file: Path, run: str | None, tenant: str | None, snapshot: str | None
) -> CampaignSpec:
    """The campaign of a file.

    Raises:
        InvalidCampaign: with every mistake, its line, field and what was expected.
    """

    def check(leg: LegSpec) -> None:
        compile_template(TemplateSource(leg.subject, leg.html, leg.text))

    try:
        text = file.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidCampaign(f"{file} can't be read as UTF-8 text: {error}") from error
    now = datetime.now(UTC)
    return parse_campaign(
        text,
        now=now,
        read_text=lambda name: (file.parent / name).read_text(),
        check_template=check,
        run=run or f"{file.stem}-{now:%Y%m%d-%H%M%S}",
        tenant=tenant,
        snapshot=snapshot,
        name=str(file),
    )


def send_command(servers: str, command: Command, prefix: str = "") -> None:
    """Write a command; returns once the broker has it. Raises Unavailable."""
    from kafka.errors import KafkaError

    from sinks.kafka_client import producer

    try:
        sender = producer(servers)
        try:
            key = f"{command.tenant}/{command.run}".encode()
            sender.send(prefix + topics.COMMANDS, encode(command), key=key).get(timeout=30)
        finally:
            sender.close()
    except KafkaError as error:
        raise Unavailable(f"the command was not taken by Kafka at {servers}: {error}") from error


def await_answer(
    servers: str, command_id: str, timeout: timedelta, prefix: str = ""
) -> RunEvent | None:
    """The audit event of a command, or None when it does not come in time."""
    from sinks.kafka_client import read_from_end

    until = time.monotonic() + timeout.total_seconds()
    with read_from_end(servers, prefix + topics.RUNS, back=2000) as poll:
        while time.monotonic() < until:
            for value in poll():
                event = readable(value)
                if event is not None and event.command_id == command_id:
                    return event
    return None


def _issue(command: Command, wait: float, as_json: bool, home: Path | None) -> None:
    servers = variable("FANFARE_KAFKA", home)
    prefix = topic_prefix(home)
    send_command(servers, command, prefix)
    event = None
    if wait:
        event = await_answer(servers, command.command_id, timedelta(seconds=wait), prefix)
    if as_json:
        print(json.dumps(_answer(command, event)))
    elif event is None:
        said = (
            "was written; its answer was not waited for"
            if not wait
            else (
                f"was written, and not answered in {wait:g} s: is the campaigns job running? "
                "It is carried out when the job gets to it."
            )
        )
        print(f"{command.kind.value} {command.run}: {said}")
    elif event.accepted:
        print(f"{command.run} is {event.status.value}")
    else:
        _errors.print(f"refused: {event.note}", style="red", soft_wrap=True, markup=False)
    if event is not None and not event.accepted:
        raise typer.Exit(1)
    if event is None and wait:
        raise typer.Exit(3)


def _answer(command: Command, event: RunEvent | None) -> dict[str, object]:
    return {
        "run": command.run,
        "command": command.kind.value,
        "command_id": command.command_id,
        "answered": event is not None,
        "accepted": event.accepted if event is not None else None,
        "status": event.status.value if event is not None else None,
        "note": event.note if event is not None else "",
        "audience": event.audience if event is not None else None,
    }


def new_command(
    kind: CommandKind,
    tenant: str,
    run: str,
    *,
    note: str = "",
    launch: CampaignSpec | None = None,
    rate_per_second: float | None = None,
    start_at: datetime | None = None,
) -> Command:
    """A command of the person at this terminal."""
    return Command(
        command_id=str(uuid.uuid4()),
        tenant=Tenant(tenant),
        run=RunId(run),
        kind=kind,
        issued_at=datetime.now(UTC),
        issued_by=getpass.getuser(),
        note=note,
        launch=launch,
        rate_per_second=rate_per_second,
        start_at=start_at,
    )


@app.command()
def launch(
    file: Annotated[Path, typer.Argument(help="The campaign file (YAML).")],
    run: Annotated[
        str | None, typer.Option(help="The run's name. (default: file and time)")
    ] = None,
    snapshot: Annotated[
        str | None, typer.Option(help="The audience, where the file names none.")
    ] = None,
    tenant: Annotated[
        str | None, typer.Option(help="Whose it is, where the file is silent.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Send nothing; tell who would be sent, and why not.")
    ] = False,
    wait: WaitOption = 30.0,
    as_json: JsonOption = False,
    home: HomeOption = None,
) -> None:
    """Launch a campaign. A file with mistakes is refused, with line, field and expectation."""
    spec = read_campaign(file, run, tenant or "default", snapshot)
    store = FileStore(variable("FANFARE_STORE", home))
    audience = store.open_snapshot(spec.snapshot)
    problems = list(misfits(spec, audience.manifest)) or list(
        unrenderable(spec, _first_pages(audience))
    )
    if problems:
        raise InvalidCampaign(f"{file} does not fit its audience:\n  " + "\n  ".join(problems))
    if dry_run:
        _tell_dry_run(spec, store, home, as_json)
        return
    command = new_command(CommandKind.LAUNCH, spec.tenant, spec.run, launch=spec)
    _issue(command, wait, as_json, home)


def _first_pages(audience: Snapshot) -> Iterator[tuple[list[str], PageBody]]:
    """Pages on whose people templates are tried; a damaged one is told by ``audience verify``."""
    for entry in audience.manifest.pages:
        with suppress(CorruptPage):
            index = audience.read_index(entry.shard, entry.page)
            yield index.recipient_ids, audience.read_body(entry.shard, entry.page)


def dry_run_counts(
    spec: CampaignSpec, store: FileStore, consents: dict[str, bytes], now: datetime
) -> dict[str, Counter[str]]:
    """What would be decided now: by leg, counts of ``send``, ``skip:…``, ``defer:…``, ``expired``.

    ``consents`` is what the consent topic says, by recipient. Caps count no earlier campaign.
    """
    from transforms.decide import decide_page

    snapshot = store.open_snapshot(spec.snapshot)
    found: dict[str, Counter[str]] = {}
    for leg in spec.legs:
        counts = found.setdefault(leg.leg, Counter())
        for entry in snapshot.manifest.pages:
            order = PageOrder(
                spec.tenant,
                spec.run,
                leg.leg,
                ObjectId(""),
                spec.snapshot,
                entry.shard,
                entry.page,
                0,
                bitmap_bytes(full_bitmap(entry.count)),
                now,
            )
            index = snapshot.read_index(entry.shard, entry.page)
            result = decide_page(order, spec, index, consents.get, now).result
            counts["send"] += bitmap_from(result.sends).bit_count()
            for skip in result.skips:
                name = "expired" if skip.expired else f"skip:{skip.reason.value}"
                counts[name] += bitmap_from(skip.ordinals).bit_count()
            for group in result.deferrals:
                name = f"defer:{group.reason.value}"
                counts[name] += bitmap_from(group.ordinals).bit_count()
    return found


def _consents(tenant: str, home: Path | None) -> dict[str, bytes]:
    """The state that the consent topic makes of each recipient of a tenant."""
    from schemas.state import RecipientState
    from sinks.kafka_client import read_all
    from transforms.consent import apply_consent

    states: dict[str, RecipientState] = {}
    unreadable = 0
    for value in read_all(variable("FANFARE_KAFKA", home), topic_prefix(home) + topics.CONSENT):
        try:
            change = decode(value, ConsentChange)
        except MalformedRecord:
            unreadable += 1
            continue
        if change.tenant == tenant:
            states[change.recipient_id] = apply_consent(states.get(change.recipient_id), change)
    if unreadable:
        _errors.print(f"{unreadable} records of the consent topic can't be read; left out")
    return {recipient: encode(state) for recipient, state in states.items()}


def _tell_dry_run(spec: CampaignSpec, store: FileStore, home: Path | None, as_json: bool) -> None:
    found = dry_run_counts(spec, store, _consents(spec.tenant, home), datetime.now(UTC))
    if as_json:
        print(json.dumps({"run": spec.run, "dry_run": True, "legs": found}))
        return
    for leg, counts in found.items():
        table = Table(title=f"{spec.campaign}, {leg}: if launched now", title_justify="left")
        table.add_column("decision")
        table.add_column("people", justify="right")
        for name, count in sorted(counts.items(), key=lambda item: (item[0] != "send", -item[1])):
            table.add_row(name, f"{count:,}")
        table.add_row("audience", f"{sum(counts.values()):,}", style="bold")
        Console().print(table)
    print("Messages of earlier campaigns are not counted against the caps here. Nothing was sent.")


def _control(
    kind: CommandKind,
    run: str,
    tenant: str,
    note: str,
    wait: float,
    as_json: bool,
    home: Path | None,
    rate: float | None = None,
) -> None:
    _issue(new_command(kind, tenant, run, note=note, rate_per_second=rate), wait, as_json, home)


NoteOption = Annotated[str, typer.Option("--note", help="Why; kept in the audit trail.")]


@app.command()
def pause(
    run: RunArgument,
    tenant: TenantOption = "default",
    note: NoteOption = "",
    wait: WaitOption = 30.0,
    as_json: JsonOption = False,
    home: HomeOption = None,
) -> None:
    """Pause a run: requests in flight finish, nothing new starts."""
    _control(CommandKind.PAUSE, run, tenant, note, wait, as_json, home)


@app.command()
def resume(
    run: RunArgument,
    tenant: TenantOption = "default",
    note: NoteOption = "",
    wait: WaitOption = 30.0,
    as_json: JsonOption = False,
    home: HomeOption = None,
) -> None:
    """Resume a paused run at the exact recipient."""
    _control(CommandKind.RESUME, run, tenant, note, wait, as_json, home)


@app.command()
def cancel(
    run: RunArgument,
    tenant: TenantOption = "default",
    note: NoteOption = "",
    wait: WaitOption = 30.0,
    as_json: JsonOption = False,
    home: HomeOption = None,
) -> None:
    """Cancel a run for good: who was not sent to counts as cancelled."""
    _control(CommandKind.CANCEL, run, tenant, note, wait, as_json, home)


@app.command()
def schedule(
    run: RunArgument,
    at: Annotated[
        str,
        typer.Option(
            help="A time with its offset, such as 2026-03-10T09:00:00+01:00, +3h from now, or now."
        ),
    ],
    tenant: TenantOption = "default",
    note: NoteOption = "",
    wait: WaitOption = 30.0,
    as_json: JsonOption = False,
    home: HomeOption = None,
) -> None:
    """Begin a run that has not begun at another time."""
    now = datetime.now(UTC)
    start_at = now if at == "now" else read_moment(at, now)
    command = new_command(CommandKind.SCHEDULE, tenant, run, note=note, start_at=start_at)
    _issue(command, wait, as_json, home)


@app.command()
def rate(
    run: RunArgument,
    per_second: Annotated[
        float | None, typer.Argument(help="Messages a second. (default: no limit of the run's own)")
    ] = None,
    tenant: TenantOption = "default",
    note: NoteOption = "",
    wait: WaitOption = 30.0,
    as_json: JsonOption = False,
    home: HomeOption = None,
) -> None:
    """Change a run's rate while it runs."""
    _control(CommandKind.SET_RATE, run, tenant, note, wait, as_json, home, per_second)


@app.command()
def status(
    run: Annotated[
        str | None, typer.Argument(metavar="[RUN]", help="One run; all if not given.")
    ] = None,
    tenant: TenantOption = "default",
    as_json: JsonOption = False,
    home: HomeOption = None,
) -> None:
    """How a run stands, as its coordinator last said; without RUN, all runs."""
    from sinks.kafka_client import read_all

    latest: dict[str, RunEvent] = {}
    for value in read_all(variable("FANFARE_KAFKA", home), topic_prefix(home) + topics.RUNS):
        event = readable(value)
        if event is None:
            continue
        if event.tenant == tenant and event.campaign and run in (None, event.run):
            latest[event.run] = event
    if run is not None and run not in latest:
        raise InvalidCampaign(f"there is no run {run!r} of tenant {tenant!r}")
    rows = [
        {
            "run": event.run,
            "campaign": event.campaign,
            "status": event.status.value,
            "audience": event.audience,
            "pending": event.pending,
            "unordered": event.audience - event.ordered,
            "open": event.open,
            "deferred": event.deferred,
            "at": event.at.isoformat(),
            "note": event.note,
        }
        for event in sorted(latest.values(), key=lambda one: one.at)
    ]
    if as_json:
        print(json.dumps(rows[0] if run is not None else rows))
        return
    table = Table(box=None)
    for name in ("run", "status", "audience", "pending", "open", "deferred", "as of"):
        table.add_column(name, justify="left" if name in ("run", "status", "as of") else "right")
    for event in sorted(latest.values(), key=lambda one: one.at):
        table.add_row(
            event.run,
            event.status.value,
            f"{event.audience:,}",
            f"{event.pending:,}",
            f"{event.open:,}",
            f"{event.deferred:,}",
            f"{event.at:%Y-%m-%d %H:%M:%S} UTC",
        )
    Console().print(table)
