"""`fanfare ledger`: the send ledger of a run: what is in it; rebuilding it after Redis lost it."""

from __future__ import annotations

import getpass
import json
import uuid
from dataclasses import asdict
from datetime import UTC, datetime
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from schemas.codec import encode
from schemas.errors import MissingLedger
from schemas.ids import LegId, RunId, Tenant
from schemas.reasons import RunStatus
from sinks import ledger_rebuild, ledger_upkeep, runs
from sinks.audit import audit_event
from sinks.books import run_facts
from sinks.clickhouse import connect
from sinks.redis_client import connect as connect_redis
from stack.operators import (
    REFUSED,
    RunArgument,
    TenantOption,
    servers,
    write,
)
from stack.options import HomeOption, JsonOption
from transforms.ledger import LedgerRef

app = typer.Typer(no_args_is_help=True, help="The send ledger of a run.")
_errors = Console(stderr=True)


@app.command()
def show(
    run: RunArgument,
    tenant: TenantOption = "default",
    as_json: JsonOption = False,
    home: HomeOption = None,
) -> None:
    """Show what the ledger of a run holds, by leg. Exit status 1 where it is gone."""
    where = servers(home)
    clickhouse = connect(where.clickhouse)
    try:
        facts = run_facts(clickhouse, tenant, run)
    finally:
        clickhouse.close()
    redis = connect_redis(where.redis)
    rows: list[dict[str, object]] = []
    gone: list[str] = []
    try:
        published = runs.read(redis, Tenant(tenant), RunId(run))
        for leg in map(LegId, facts.legs):
            try:
                counts = ledger_upkeep.counts(redis, Tenant(tenant), RunId(run), leg)
            except MissingLedger as error:
                gone.append(f"{leg}: {error}")
                continue
            rebuilt = ledger_upkeep.last_rebuilt(
                redis, LedgerRef(Tenant(tenant), RunId(run), leg, 0)
            )
            row: dict[str, object] = {"leg": leg, **asdict(counts)}
            row["rebuilt_at"] = None if rebuilt is None else rebuilt[0].isoformat()
            row["rebuilt_by"] = None if rebuilt is None else rebuilt[1]
            rows.append(row)
    finally:
        redis.close()
    status = None if published is None else published.status.value
    if as_json:
        told = {"tenant": tenant, "run": run, "status": status, "legs": rows, "gone": gone}
        print(json.dumps(told))
    else:
        print(f"{run}: Redis says {status or 'nothing of the run: nothing of it is sent'}")
        if rows:
            table = Table(box=None, show_header=False)
            for name in rows[0]:
                table.add_row(name.replace("_", " "), *(_shown(name, row[name]) for row in rows))
            Console().print(table)
        for line in gone:
            _errors.print(f"gone: {line}", style="red", soft_wrap=True, markup=False)
    if gone:
        raise typer.Exit(REFUSED)


def _shown(name: str, value: object) -> str:
    if isinstance(value, int) and name != "seq":
        return f"{value:,}"
    return "" if value is None else str(value)


@app.command()
def rebuild(
    run: RunArgument,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Write nothing; tell what would be written.")
    ] = False,
    force: Annotated[
        bool,
        typer.Option("--force", help="Redis lost writes, though a ledger is there: rolled back."),
    ] = False,
    gaps_in_doubt: Annotated[
        bool,
        typer.Option(
            "--gaps-in-doubt",
            help="Topics no longer reach back to the launch: hold everybody without an outcome.",
        ),
    ] = False,
    by: Annotated[
        str | None, typer.Option("--by", help="Your name, for the audit trail. (default: login)")
    ] = None,
    note: Annotated[str, typer.Option("--note", help="Why, for the audit trail.")] = "",
    tenant: TenantOption = "default",
    as_json: JsonOption = False,
    home: HomeOption = None,
) -> None:
    """Rebuild the ledger of a paused or ended run from Kafka, after Redis lost it.

    Whoever was sent to, as far as decisions tell, and has no outcome, becomes unknown.
    """
    where = servers(home)
    now = datetime.now(UTC)
    clickhouse = connect(where.clickhouse)
    redis = connect_redis(where.redis)
    try:
        launched = ledger_rebuild.launched_run(clickhouse, where.store, tenant, run)
        found = ledger_rebuild.plan(
            where.kafka,
            where.prefix,
            launched,
            now,
            gaps_in_doubt,
            lambda line: _errors.print(line, style="dim"),
        )
        who = by or getpass.getuser()
        if not dry_run:
            status = ledger_rebuild.check(redis, found, force)
            ledger_rebuild.write(redis, found, who, force)
            facts = run_facts(clickhouse, tenant, run)
    finally:
        redis.close()
        clickhouse.close()
    rows = [asdict(counts) for counts in found.counts()]
    told = "; ".join(
        f"{row['leg']}: {row['accepted']:,} accepted, {row['held']:,} held "
        f"({row['in_doubt']:,} in doubt), {row['closed']:,} closed of {row['recipients']:,}"
        for row in rows
    )
    lines: list[str] = []
    if not dry_run:
        lines += ledger_rebuild.afterwards(status, run)
        event = audit_event(
            f"rebuild-{uuid.uuid4()}",
            launched.tenant,
            launched.run,
            launched.snapshot,
            RunStatus(facts.coordinator.status),
            who,
            f"ledger rebuilt ({told}): {note}",
            now,
        )
        write(where, [encode(event)])
    if as_json:
        done = {"run": run, "written": not dry_run, "legs": rows, "gaps": list(found.gaps)}
        print(json.dumps({**done, "next": lines}))
        return
    print(f"{run}: {'would be written' if dry_run else 'rebuilt'}: {told}")
    for line in lines:
        print(line)
