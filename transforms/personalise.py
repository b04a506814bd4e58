"""From a decided recipient to a message: what a leg has in common, and one person."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

from schemas.errors import RenderingFailed
from schemas.ids import LegId, RecipientId, RunId, Tenant, send_id
from schemas.message import Message, Sender
from schemas.reasons import Channel
from schemas.records import CampaignSpec, LegSpec, Route
from transforms.rendering import CompiledTemplate, TemplateSource, compile_template, render
from transforms.unsubscribe import make_token


class Body(Protocol):
    """What a message needs of a snapshot page; ``schemas.snapshot.PageBody`` has it."""

    def email(self, i: int) -> str | None:
        """A recipient's e-mail address."""

    def locale(self, i: int) -> str | None:
        """A recipient's locale."""

    def attributes(self, i: int) -> Mapping[str, object]:
        """A recipient's attributes; ``None`` for what it lacks."""


@dataclass(frozen=True, slots=True)
class LegContext:
    """What all messages of a leg share."""

    tenant: Tenant
    run: RunId
    leg: LegId
    channel: Channel
    topic: str
    routes: tuple[Route, ...]
    sender: Sender
    template: CompiledTemplate
    defaults: Mapping[str, str]
    unsubscribe: Callable[[str], str] | None
    """The one-click URL of a recipient id; None where no receiver is configured."""


def leg_context(
    spec: CampaignSpec, leg: LegSpec, receiver: str, unsubscribe_secret: bytes
) -> LegContext:
    """Prepare a leg: compiles its template.

    Raises:
        InvalidTemplate: it can't be used.
    """
    link: Callable[[str], str] | None = None
    if receiver and unsubscribe_secret:
        base = receiver.rstrip("/")

        def link(recipient: str) -> str:
            token = make_token(
                unsubscribe_secret, spec.tenant, recipient, spec.topic, leg.channel.value
            )
            return f"{base}/u/{token}"

    return LegContext(
        tenant=spec.tenant,
        run=spec.run,
        leg=leg.leg,
        channel=leg.channel,
        topic=spec.topic,
        routes=leg.routes,
        sender=Sender(leg.sender_address, leg.sender_name, leg.reply_to),
        template=compile_template(TemplateSource(leg.subject, leg.html, leg.text)),
        defaults=spec.defaults,
        unsubscribe=link,
    )


def message_to(
    context: LegContext,
    recipient: RecipientId,
    body: Body,
    index: int,
    reference: str,
    clock: Callable[[], float],
) -> Message:
    """The message to the ``index``-th recipient of a page.

    ``reference`` is ``shard.ordinal.generation``: it travels with the message and comes back in
    webhooks, so that they name the recipient without an address. ``clock`` gives seconds spent;
    rendering is stopped by it.

    Raises:
        RenderingFailed: the template fails on this person's data, or the address is missing.
    """
    address = body.email(index)
    if not address:
        raise RenderingFailed("the recipient has no e-mail address in the snapshot")
    attributes = body.attributes(index)
    values: dict[str, object] = dict(attributes)
    for variable, default in context.defaults.items():
        if values.get(variable) is None:
            values[variable] = default
    link = context.unsubscribe(recipient) if context.unsubscribe is not None else None
    values["recipient_id"] = recipient
    values["locale"] = body.locale(index)
    values["unsubscribe_url"] = link
    content = render(context.template, values, clock=clock)
    first = values.get("first_name")
    last = values.get("last_name")
    name = " ".join(str(part) for part in (first, last) if part) or None
    return Message(
        send_id=send_id(context.tenant, context.run, context.leg, recipient),
        tenant=context.tenant,
        run=context.run,
        leg=context.leg,
        to_address=address,
        to_name=name,
        sender=context.sender,
        content=content,
        unsubscribe_url=link,
        reference=reference,
    )
