"""The errors of Fanfare, one tree.

    FanfareError
    ├── InvalidInput            what a person or a producer gave us is wrong
    │   ├── InvalidCampaign     a campaign file or launch command: field, place, what was expected
    │   ├── InvalidProfile      a row of an audience source
    │   ├── InvalidTemplate     a template that does not parse, or may not be used
    │   ├── InvalidSegment      a segment expression
    │   ├── InvalidWebhook      a webhook with a wrong signature, shape or size
    │   └── MalformedRecord     bytes that are no record of ours
    │       └── UnknownSchema   a record whose writer's schema nobody here knows
    ├── Missing                 what was named does not exist
    │   ├── MissingSnapshot
    │   ├── MissingObject       a spec or template that the store does not hold
    │   └── MissingLedger       the ledger of a run is absent: refused, never read as untouched
    ├── Corrupt                 what exists is not what was written
    │   ├── CorruptPage         a page whose hash differs from its manifest
    │   └── LedgerRolledBack    a ledger older than what Flink's state has seen
    ├── IncompatibleState       what Flink keeps was written by a layout that this version lacks
    ├── Fenced                  a successor owns the delivery key: this process must stop writing
    ├── RenderingFailed         a template failed on one recipient's data, or passed its limits
    ├── Unavailable             a server did not answer: retry later; nothing was decided
    └── StackFailed             a part of the embedded stack did not start or stop

A message says what was wrong, where, and what to do.
"""

from __future__ import annotations


class FanfareError(Exception):
    """Root of all errors that Fanfare raises on purpose."""


class InvalidInput(FanfareError):
    """What a person or a producer gave is wrong; giving it again will not help."""


class InvalidCampaign(InvalidInput):
    """A campaign definition is wrong; the message names line, field and expectation."""


class InvalidProfile(InvalidInput):
    """A row of an audience source can't be used; the message is the reject's reason."""


class InvalidTemplate(InvalidInput):
    """A template does not parse or uses what is not allowed."""


class InvalidSegment(InvalidInput):
    """A segment expression does not parse, or names what profiles don't have."""


class InvalidWebhook(InvalidInput):
    """A webhook's signature, shape or size is wrong."""


class MalformedRecord(InvalidInput):
    """Bytes that are no record of ours; they belong in the dead-letter topic, whole."""


class UnknownSchema(MalformedRecord):
    """A record whose fingerprint no known schema has."""


class Missing(FanfareError):
    """What was named does not exist."""


class MissingSnapshot(Missing):
    """An audience snapshot is not in the store."""


class MissingObject(Missing):
    """A content-addressed object (campaign spec, template) is not in the store."""


class MissingLedger(Missing):
    """The ledger of a run is absent. It is refused, never read as untouched."""


class Corrupt(FanfareError):
    """What exists is not what was written."""


class CorruptPage(Corrupt):
    """A snapshot page whose SHA-256 differs from the manifest's."""


class LedgerRolledBack(Corrupt):
    """A ledger whose dataset or sequence number is behind the one already seen."""


class IncompatibleState(FanfareError):
    """Kept state of a layout that nobody here knows: the job must end, and touch none of it.

    Neither a ``MalformedRecord`` nor ``Corrupt``: it is whole, and those who skip what they can't
    read must not skip it.
    """


class Fenced(FanfareError):
    """Another process holds a later epoch of this delivery key; this one must stop."""


class RenderingFailed(FanfareError):
    """A template failed on one recipient's data or passed its size or time limit."""


class Unavailable(FanfareError):
    """A server did not answer. Nothing was decided; try again later."""


class StackFailed(FanfareError):
    """A part of the embedded stack did not start or stop."""
