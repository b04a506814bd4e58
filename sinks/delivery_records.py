"""What delivery tells of finished messages: outcomes, dead letters, addresses to suppress."""

from __future__ import annotations

from collections.abc import Sequence

from schemas.ids import RecipientId, derive
from schemas.pages import bitmap_bytes, bitmap_of
from schemas.reasons import Outcome, Reason
from schemas.records import (
    ConsentChange,
    ConsentStatus,
    DeadLetter,
    OutcomeGroup,
    Outcomes,
    Send,
)
from sinks.delivery_work import Completion
from transforms.delivery import REPEATED, REPLAYABLE


def records_of(done: Sequence[Completion]) -> list[Outcomes | DeadLetter | ConsentChange]:
    """Outcomes by page, dead letters by page and reason, and addresses to suppress."""
    pages: dict[int, list[Completion]] = {}
    for one in done:
        pages.setdefault(id(one.work), []).append(one)
    records: list[Outcomes | DeadLetter | ConsentChange] = []
    for completions in pages.values():
        send = completions[0].work.send
        groups: dict[tuple[object, ...], list[Completion]] = {}
        for one in completions:
            group = (
                one.outcome,
                one.reason,
                one.provider,
                one.generation,
                one.attempts,
                one.repeated,
            )
            groups.setdefault(group, []).append(one)
        records.append(
            Outcomes(
                send.tenant,
                send.run,
                send.leg,
                send.snapshot,
                send.shard,
                send.page,
                max(one.at for one in completions),
                tuple(_group(members) for members in groups.values()),
            )
        )
        records += [_suppression(send, one) for one in completions if one.recipient]
        records += [
            _dead_letter(send, members)
            for members in groups.values()
            if members[0].outcome is Outcome.FAILED and members[0].reason in REPLAYABLE
        ]
    return records


def _group(members: Sequence[Completion]) -> OutcomeGroup:
    first = members[0]
    ids = tuple(one.provider_id for one in members)
    detail = next((one.detail for one in members if one.detail), "")
    if first.repeated:
        detail = f"{REPEATED}; {detail}" if detail else REPEATED
    return OutcomeGroup(
        first.outcome,
        first.reason,
        first.provider,
        first.generation,
        tuple(one.index for one in members),
        ids if any(ids) else (),
        first.attempts,
        detail,
    )


def _suppression(send: Send, refused: Completion) -> ConsentChange:
    """The provider says that the address is dead: nothing more is sent to it on this channel."""
    return ConsentChange(
        change_id=derive(
            "dead-address",
            (send.tenant, send.run, send.leg, refused.recipient, refused.generation),
        ),
        tenant=send.tenant,
        recipient_id=RecipientId(refused.recipient),
        channel=send.channel.value,
        topic="*",
        status=ConsentStatus.SUPPRESSED,
        at=refused.at,
        source=refused.provider,
    )


def _dead_letter(send: Send, members: Sequence[Completion]) -> DeadLetter:
    first = members[0]
    ordinals = bitmap_bytes(bitmap_of(one.index for one in members))
    return DeadLetter(
        letter_id=derive(
            "dead-letter",
            (
                send.tenant,
                send.run,
                send.leg,
                send.shard,
                send.page,
                first.generation,
                first.reason.value,
                ordinals.hex(),
            ),
        ),
        tenant=send.tenant,
        run=send.run,
        step=f"delivery/{'render' if first.reason is Reason.RENDERING_FAILED else 'request'}",
        reason=first.reason,
        detail=first.detail,
        source=f"page {send.page} of shard {send.shard}",
        original=b"",
        first_at=send.decided_at,
        last_at=max(one.at for one in members),
        leg=send.leg,
        shard=send.shard,
        page=send.page,
        ordinals=ordinals,
        generation=first.generation,
        attributes={"provider": first.provider, "snapshot": send.snapshot, "spec": send.spec},
    )
