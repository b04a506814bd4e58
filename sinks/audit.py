"""The audit trail of what people do beside the coordinator: who, when, what, why."""

from __future__ import annotations

from datetime import datetime

from schemas.ids import RunId, SnapshotId, Tenant, derive
from schemas.reasons import RunStatus
from schemas.records import RunEvent


def audit_event(
    command_id: str,
    tenant: Tenant,
    run: RunId,
    snapshot: SnapshotId,
    status: RunStatus,
    by: str,
    note: str,
    at: datetime,
) -> RunEvent:
    """A row of ``fanfare_run_events`` for what a person did; the same for the same command id.

    It is no word of the run's coordinator, so it names no campaign and counts nothing: readers of
    a run's state leave it out by that.
    """
    return RunEvent(
        event_id=derive("run-event", (tenant, run, command_id)),
        tenant=tenant,
        run=run,
        campaign="",
        version=0,
        status=status,
        at=at,
        command_id=command_id,
        command=None,
        by=by,
        accepted=True,
        note=note,
        spec=None,
        snapshot=snapshot,
        audience=0,
        legs=(),
        pending=0,
        ordered=0,
        open=0,
        deferred=0,
    )
