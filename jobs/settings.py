"""Settings of the jobs, from the environment: ``FANFARE_`` and the field's name in capitals.

This is the only place of ``jobs`` that reads the environment, and it reads it in the process that
submits a job. Operators get values. Durations are ISO 8601 (``PT0.5S``) or seconds.
"""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

from pydantic import Field, SecretStr, ValidationError
from pydantic_settings import BaseSettings, SettingsConfigDict

from schemas.errors import InvalidInput

PREFIX = "FANFARE_"


class JobSettings(BaseSettings):
    """What every job needs."""

    model_config = SettingsConfigDict(env_prefix=PREFIX, frozen=True, extra="ignore")

    kafka: str
    """``host:port``, or several with commas."""
    store: Path
    """The folder of snapshots, specs and templates; the same path on every machine."""
    topic_prefix: str = ""
    """Written before every topic's name of ``schemas.topics``."""
    parallelism: int = Field(default=1, ge=1, le=256)
    checkpoint_interval: timedelta = timedelta(seconds=2)
    buffer_timeout: timedelta = timedelta(milliseconds=5)

    def topic(self, name: str) -> str:
        """The deployed name of a topic of ``schemas.topics``."""
        return f"{self.topic_prefix}{name}"


class CampaignsSettings(JobSettings):
    """The campaigns job."""

    redis: SecretStr
    """``redis://[:password@]host:port/db``."""
    window: int = Field(default=20_000, ge=500)
    """Recipients of a leg that may be ordered and not resolved at once."""
    transaction_timeout: timedelta = timedelta(minutes=15)


class DeliverySettings(JobSettings):
    """The delivery job of one lane."""

    redis: SecretStr
    sendgrid_url: str = "https://api.sendgrid.com"
    sendgrid_key: SecretStr = SecretStr("")
    smtp: str = ""
    """``host:port`` of the SMTP relay; empty: no SMTP route."""
    receiver: str = ""
    """Public URL of the receiver, for unsubscribe links."""
    unsubscribe_secret: SecretStr = SecretStr("")


class IngestSettings(JobSettings):
    """The webhook-ingest job."""

    clickhouse: SecretStr
    """``http[s]://user:password@host:port[/database]``."""
    ingest_group: str = "fanfare-webhook-ingest"
    """Kafka consumer group; the lag of the books is measured by its committed offsets."""
    flush_after: timedelta = timedelta(milliseconds=500)
    batch_rows: int = Field(default=20_000, ge=1)
    dead_letter_ratio: float = Field(default=0.05, ge=0, le=1)
    """The job stops when more than this share of its recent records are dead letters."""
    dead_letter_window: int = Field(default=1_000, ge=1)
    """Records that must have been seen before the ratio counts."""


Settings = TypeVar("Settings", bound=JobSettings)


def load(settings: type[Settings]) -> Settings:
    """The settings of a job.

    Raises:
        InvalidInput: variables are missing or wrong; the message names each and what was expected,
            and repeats no value (it may be a secret).
    """
    try:
        values: dict[str, Any] = {}
        return settings(**values)
    except ValidationError as error:
        lines = [
            f"{PREFIX}{'.'.join(str(part) for part in one['loc']).upper()}: {one['msg']}"
            for one in error.errors(include_input=False, include_url=False)
        ]
        raise InvalidInput(
            f"{settings.__name__} can't be read from the environment: " + "; ".join(lines)
        ) from None
