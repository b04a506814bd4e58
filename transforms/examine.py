"""Whether a campaign fits the snapshot that it names: asked before anything is sent."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice

from schemas.errors import InvalidTemplate, RenderingFailed
from schemas.ids import RecipientId
from schemas.reasons import Channel
from schemas.records import CampaignSpec, LegSpec, Route
from schemas.snapshot import Manifest
from transforms.personalise import Body, leg_context, message_to
from transforms.rendering import TemplateSource, explain_variables

PROVIDED = frozenset({"recipient_id", "locale", "unsubscribe_url"})
"""Variables that every message has beside its person's attributes."""


def misfits(spec: CampaignSpec, manifest: Manifest) -> Iterator[str]:
    """The problems of a definition with its snapshot, each with field and what to do."""
    if manifest.tenant != spec.tenant:
        yield (
            f"snapshot: {spec.snapshot} belongs to another tenant than {spec.tenant!r}; "
            "build the audience with this tenant"
        )
        return
    yield from undeliverable(spec)
    known = PROVIDED | set(manifest.attributes) | set(spec.defaults)
    for position, leg in enumerate(spec.legs):
        yield from _template_misfits(f"legs[{position}]", leg, known)


DELIVERABLE: Mapping[Channel, frozenset[Route]] = {
    Channel.EMAIL: frozenset({Route("smtp", "main"), Route("sendgrid", "main")})
}
"""The channels on which messages can be sent, and the accounts that a deployment may have."""


def undeliverable(spec: CampaignSpec) -> Iterator[str]:
    """The legs that nothing can send, and the routes to accounts that there can't be."""
    for position, leg in enumerate(spec.legs):
        accounts = DELIVERABLE.get(leg.channel)
        if accounts is None:
            yield (
                f"legs[{position}].channel: {leg.channel.value} has no provider yet; expected "
                f"{' or '.join(sorted(channel.value for channel in DELIVERABLE))}"
            )
            continue
        for number, route in enumerate(leg.routes):
            if route not in accounts:
                known = sorted(f"{one.provider} / {one.account}" for one in accounts)
                yield (
                    f"legs[{position}].routes[{number}]: there is no account {route.provider!r} / "
                    f"{route.account!r}; expected one of {', '.join(known)}"
                )


def _template_misfits(where: str, leg: LegSpec, known: frozenset[str]) -> Iterator[str]:
    try:
        wanted = explain_variables(TemplateSource(leg.subject, leg.html, leg.text))
    except InvalidTemplate as error:
        yield f"{where}: {error}"
        return
    for name in sorted(wanted - known):
        yield (
            f"{where}: the template uses {name!r}, which the snapshot lacks; it has "
            f"{', '.join(sorted(known - PROVIDED))}. Give it a value under `defaults`"
        )


TRIED = 20
"""People on whom the templates of a launch are tried."""
_OF_A_PAGE = 4
_PAGES = 200
"""That are looked into for somebody with an address, however large the audience: coordinate serves
other runs, too."""
_TRIED_RECEIVER = "https://unsubscribe.invalid"
_TRIED_SECRET = bytes(32)
"""No message leaves with such a link: it is only as long as a real one."""


Page = tuple[Sequence[str], Body]
"""Recipient ids of a page, and what it knows of them."""


def unrenderable(spec: CampaignSpec, pages: Iterable[Page]) -> Iterator[str]:
    """The legs whose template fails on each of some people, the first ones with an address.

    A template that loops for ever, prints nothing or reads what nobody has is refused before
    anything is sent; one that fails on some people's data fails for those alone, when they are
    sent to. Rendering is bounded by steps here, not by a clock: every replay says the same.
    """
    people = list(islice(_reachable(pages), TRIED))
    for position, leg in enumerate(spec.legs):
        context = leg_context(spec, leg, _TRIED_RECEIVER, _TRIED_SECRET)
        failure = ""
        for recipient, body, index in people:
            try:
                message_to(context, recipient, body, index, "", lambda: 0.0)
            except RenderingFailed as error:
                failure = failure or str(error)
            else:
                break
        else:
            if people:
                yield (
                    f"legs[{position}]: the template failed on each of {len(people)} people that "
                    f"it was tried on: {failure}"
                )


def _reachable(pages: Iterable[Page]) -> Iterator[tuple[RecipientId, Body, int]]:
    """People with an address, a few of each page: those of a page share their zone."""
    for ids, body in islice(pages, _PAGES):
        there = [index for index in range(len(ids)) if body.email(index)]
        for index in there[:: max(1, len(there) // _OF_A_PAGE)][:_OF_A_PAGE]:
            yield RecipientId(ids[index]), body, index
