"""Profiles as sources give them: columns, limits, and why a row is refused.

A source is a table. ``recipient_id`` is required; the other columns of ``KNOWN_COLUMNS`` have the
meaning that stands beside them; every other column is an attribute of the person, for segments and
templates. Blanks around values of known columns are dropped, and an empty value is an absent one.
"""

from __future__ import annotations

from enum import Enum

RECIPIENT_ID = "recipient_id"
EMAIL = "email"
PHONE = "phone"
PUSH_TOKEN = "push_token"  # noqa: S105 - a column's name
ZONE = "zone"
LOCALE = "locale"
CONSENTS = "consents"
UPDATED_AT = "updated_at"

KNOWN_COLUMNS: dict[str, str] = {
    RECIPIENT_ID: "the tenant's own identifier of the person",
    EMAIL: "an e-mail address",
    PHONE: "a phone number in E.164, such as +4915112345678",
    PUSH_TOKEN: "a device token",
    ZONE: "an IANA time zone, such as Europe/Berlin",
    LOCALE: "a language tag, such as de-DE",
    CONSENTS: "channel:topic items separated by ';', such as email:offers;sms:*",
    UPDATED_AT: "when the row was written, ISO 8601; without an offset it is UTC",
}

CONSENT_SEPARATOR = ";"
MAX_RECIPIENT_ID_BYTES = 256
MAX_EMAIL_BYTES = 254
"""RFC 5321, 4.5.3.1.3 with erratum 1690: a path is 256 octets, two of them angle brackets."""
MAX_EMAIL_LOCAL_BYTES = 64
"""RFC 5321, 4.5.3.1.1."""
MAX_FIELD_BYTES = 4096
"""Of the other known columns; APNs and FCM tokens stay far below."""
MAX_ATTRIBUTE_BYTES = 8192
"""So that a page of 500 people stays readable in one piece."""
MAX_ATTRIBUTES = 256


class RejectReason(Enum):
    """Why a row of a source is no profile. The text stands in the rejects file."""

    COLUMN_COUNT = "the row has another number of columns than the header"
    BROKEN_QUOTES = "a quoted value is never closed or the row is longer than 128 KiB"
    UNDECODABLE = "the row has bytes that are not UTF-8, or a NUL character"
    MISSING_ID = "recipient_id is missing"
    LONG_ID = f"recipient_id is longer than {MAX_RECIPIENT_ID_BYTES} bytes"
    CONTROL_IN_ID = "recipient_id has a control character"
    BAD_EMAIL = "email is no e-mail address"
    BAD_PHONE = "phone is no E.164 number, such as +4915112345678"
    UNKNOWN_ZONE = "zone is no IANA time zone, such as Europe/Berlin"
    BAD_CONSENTS = "consents are no channel:topic items separated by ';' (email, sms, push)"
    BAD_UPDATED_AT = "updated_at is no ISO 8601 time"
    LONG_FIELD = (
        f"a value is longer than {MAX_FIELD_BYTES} bytes, an attribute {MAX_ATTRIBUTE_BYTES}"
    )
    BAD_ATTRIBUTE = "an attribute is a number that is not finite"
