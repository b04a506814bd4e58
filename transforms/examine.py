"""Whether a campaign fits the snapshot that it names: asked before anything is sent."""

from __future__ import annotations

from collections.abc import Iterator

from schemas.errors import InvalidTemplate
from schemas.records import CampaignSpec, LegSpec
from schemas.snapshot import Manifest
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
