"""Whether a campaign fits the snapshot that it names: asked before anything is sent."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from schemas.errors import InvalidTemplate, RenderingFailed
from schemas.ids import RecipientId
from schemas.records import CampaignSpec, LegSpec
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
    known = PROVIDED | set(manifest.attributes) | set(spec.defaults)
    for position, leg in enumerate(spec.legs):
        yield from _template_misfits(f"legs[{position}]", leg, known)


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
_TRIED_RECEIVER = "https://unsubscribe.invalid"
_TRIED_SECRET = bytes(32)
"""No message leaves with such a link: it is only as long as a real one."""


def unrenderable(spec: CampaignSpec, ids: Sequence[str], body: Body) -> Iterator[str]:
    """The legs whose template fails on everybody of some people, spread over a page.

    A template that loops for ever, prints nothing or reads what nobody has is refused before
    anything is sent; one that fails on some people's data fails for those alone, when they are
    sent to. Rendering is bounded by steps here, not by a clock: every replay says the same.
    """
    reachable = [index for index in range(len(ids)) if body.email(index)]
    tried = reachable[:: max(1, len(reachable) // TRIED)][:TRIED]
    for position, leg in enumerate(spec.legs):
        context = leg_context(spec, leg, _TRIED_RECEIVER, _TRIED_SECRET)
        failures: list[str] = []
        for index in tried:
            try:
                message_to(context, RecipientId(ids[index]), body, index, "", lambda: 0.0)
            except RenderingFailed as error:
                failures.append(str(error))
            else:
                break
        if tried and len(failures) == len(tried):
            yield (
                f"legs[{position}]: the template failed on each of {len(tried)} people that it was "
                f"tried on: {failures[0]}"
            )
