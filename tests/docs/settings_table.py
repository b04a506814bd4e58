"""The README's table of settings, made from the settings themselves.

``python -m tests.docs.settings_table`` writes it into the README. A setting's meaning is the first
paragraph of the string below its field; fields that need none there are told in ``MEANINGS``.
"""

from __future__ import annotations

import ast
import inspect
from datetime import timedelta
from enum import Enum
from pathlib import Path
from typing import Any

from pydantic import SecretStr
from pydantic.fields import FieldInfo
from pydantic_settings import BaseSettings

from gateway.settings import GatewaySettings
from jobs.settings import CampaignsSettings, DeliverySettings, IngestSettings, JobSettings

README = Path(__file__).resolve().parents[2] / "README.md"
BEGIN = "<!-- settings: python -m tests.docs.settings_table -->\n"
END = "<!-- end of settings -->\n"

READERS: dict[str, type[BaseSettings]] = {
    "campaigns": CampaignsSettings,
    "delivery": DeliverySettings,
    "webhook-ingest": IngestSettings,
    "receiver": GatewaySettings,
}
JOBS = frozenset({"campaigns", "delivery", "webhook-ingest"})

MEANINGS = {
    "parallelism": "Subtasks of each operator: as many one-slot TaskManagers are needed.",
    "checkpoint_interval": "Sends leave the campaigns job with each checkpoint. "
    "(delivery, webhook-ingest: `PT5S`)",
    "redis": "`redis://[:password@]host:port/db`. webhook-ingest can do without; then webhooks "
    "settle no unknowns.",
    "lane": "Whose sends are delivered: `promotional` or `critical`.",
    "sendgrid_url": "SendGrid's address, or a simulator's.",
    "sendgrid_per_second": "The account's limit, for all processes together; not set: none.",
    "sendgrid_per_minute": "Likewise.",
    "sendgrid_connections": "Connections at once, of each subtask: requests under way.",
    "sendgrid_in_flight": "Messages claimed and not yet settled at once, of each subtask: a kill "
    "leaves so many unknown at most.",
    "smtp_security": "`starttls`, `implicit` or `none`.",
    "smtp_user": "Empty: no login.",
    "smtp_password": "The relay's password.",
    "smtp_per_second": "The relay's limit, for all processes together; not set: none.",
    "smtp_per_minute": "Likewise.",
    "smtp_connections": "Sessions at once, of each subtask.",
    "smtp_in_flight": "Messages claimed and not yet settled at once, of each subtask: a kill "
    "leaves so many unknown at most.",
    "unsubscribe_secret": "What unsubscribe links are signed with, 16 bytes or more, the same in "
    "delivery and receiver; empty: no links.",
    "flush_after": "Rows wait at most so long for a batch.",
    "batch_rows": "Rows of a batch.",
    "failures": "The job ends when it fails more often than this with never "
    "`FANFARE_FAILURE_INTERVAL` between two failures; it is started again after half a second at "
    "first, after 10 seconds at most.",
    "failure_interval": "After so long without a failure the count begins anew, and the pauses "
    "before starts with it.",
    "webhook_body_timeout": "How long a body may take to arrive.",
}


def described(settings: type[BaseSettings]) -> dict[str, str]:
    """The strings below the fields of a class and of those that it extends."""
    found: dict[str, str] = {}
    for one in reversed(settings.__mro__):
        if not issubclass(one, BaseSettings) or one is BaseSettings:
            continue
        (body,) = ast.parse(inspect.getsource(one)).body
        assert isinstance(body, ast.ClassDef)
        for field, below in zip(body.body, body.body[1:], strict=False):
            if (
                isinstance(field, ast.AnnAssign)
                and isinstance(field.target, ast.Name)
                and isinstance(below, ast.Expr)
                and isinstance(below.value, ast.Constant)
            ):
                text = inspect.cleandoc(str(below.value.value))
                found[field.target.id] = " ".join(text.replace("``", "`").split())
    return found


def iso(duration: timedelta) -> str:
    """A duration as ISO 8601 writes it."""
    seconds = duration.total_seconds()
    return f"PT{seconds / 60:g}M" if seconds >= 60 and seconds % 60 == 0 else f"PT{seconds:g}S"


def shown_default(field: FieldInfo) -> str:
    """What holds where nothing is set."""
    if field.is_required():
        return "needed"
    value: Any = field.get_default(call_default_factory=True)
    if isinstance(value, SecretStr):
        value = value.get_secret_value()
    if isinstance(value, timedelta):
        value = iso(value)
    if isinstance(value, Enum):
        value = value.value
    if isinstance(value, bool):
        value = str(value).lower()
    return f"`{value}`" if value not in (None, "", {}) else ""


def variables() -> set[str]:
    """Every variable that settings are read from."""
    return {
        f"FANFARE_{name.upper()}"
        for settings in (JobSettings, *READERS.values())
        for name in settings.model_fields
    }


def table() -> str:
    """The table in Markdown. Raises KeyError for a setting that says nowhere what it means."""
    readers: dict[str, list[str]] = {}
    fields: dict[str, FieldInfo] = {}
    meanings: dict[str, str] = {}
    for reader, settings in READERS.items():
        strings = described(settings)
        for name, field in settings.model_fields.items():
            readers.setdefault(name, []).append(reader)
            fields.setdefault(name, field)
            if name in strings:
                meanings.setdefault(name, strings[name])
    lines = ["| variable | default | read by | meaning |", "|---|---|---|---|"]
    for name, field in fields.items():
        by = set(readers[name])
        who = "all jobs" if by == JOBS else "all" if by > JOBS else ", ".join(readers[name])
        meaning = MEANINGS[name] if name in MEANINGS else meanings[name]
        lines.append(f"| `FANFARE_{name.upper()}` | {shown_default(field)} | {who} | {meaning} |")
    return "\n".join(lines) + "\n"


def replaced(readme: str) -> str:
    """The README with the table as it should be."""
    before, rest = readme.split(BEGIN)
    _, after = rest.split(END)
    return f"{before}{BEGIN}{table()}{END}{after}"


if __name__ == "__main__":
    README.write_text(replaced(README.read_text()))
