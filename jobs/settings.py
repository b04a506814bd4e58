"""Settings of the jobs, from the environment: ``FANFARE_`` and the field's name in capitals.

This is the only place of ``jobs`` that reads the environment, and it reads it in the process that
submits a job. Operators get values. Durations are ISO 8601 (``PT0.5S``).
"""

from __future__ import annotations

from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from pydantic import Field, SecretStr, ValidationError
from pydantic_settings import BaseSettings, SettingsConfigDict

from schemas.errors import InvalidInput
from schemas.reasons import Lane
from schemas.records import Route
from sinks.accounts import AccountSettings, sendgrid_account, smtp_account
from sinks.secrets import UnsubscribeSecret
from sinks.shaping import Limits
from sinks.smtp_client import SmtpTls
from transforms.shaping import Limit

PREFIX = "FANFARE_"
_CRITICAL_BUFFER = timedelta(milliseconds=5)


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
    buffer_timeout: timedelta = timedelta(milliseconds=100)
    """How long Flink gathers records before it passes them on, at most 5 ms in the critical lane.
    A thread of each operator's output wakes so often, with work or without."""
    dead_letter_ratio: float = Field(default=0.05, ge=0, le=1)
    """A job stops when more than this share of its recent records are dead letters."""
    dead_letter_window: int = Field(default=1_000, ge=1)
    """Records that must have been seen before the ratio counts."""
    failures: int = Field(default=60, ge=1)
    """A job ends when it fails more often than this with never ``failure_interval`` between two
    failures: processes that are killed or away for minutes are lived through (it is started again
    after half a second at first, after 10 seconds at most), the same failure over and over is
    not."""
    failure_interval: timedelta = timedelta(seconds=30)
    """After so long without a failure the count begins anew, and so do the pauses before starts."""

    def gathers_for(self) -> timedelta:
        """How long an operator's output may keep a record back."""
        return self.buffer_timeout

    def topic(self, name: str) -> str:
        """The deployed name of a topic of ``schemas.topics``."""
        return f"{self.topic_prefix}{name}"


class CampaignsSettings(JobSettings):
    """The campaigns job."""

    redis: SecretStr
    """``redis://[:password@]host:port/db``."""
    window: int = Field(default=100_000, ge=500)
    """Recipients of a leg that may be ordered and not resolved at once, where no rate is set."""
    transaction_timeout: timedelta = timedelta(minutes=15)
    """Of Kafka transactions: longer than the longest outage that is to be lived through."""
    silence_margin: timedelta = timedelta(minutes=2)
    """An order unheard for a transaction's timeout and this is given again."""


class DeliverySettings(JobSettings):
    """The delivery job of one lane."""

    checkpoint_interval: timedelta = timedelta(seconds=5)
    """Of delivery: what was owed at the last checkpoint is handed over again after a failure, and
    the ledger knows what became of it. Outcomes don't wait for checkpoints."""
    redis: SecretStr
    lane: Lane = Lane.PROMOTIONAL
    request_timeout: timedelta = timedelta(seconds=30)
    """From connecting to a provider until its answer; what passes it is in doubt."""
    sendgrid_url: str = "https://api.sendgrid.com"
    sendgrid_key: SecretStr = SecretStr("")
    """Empty: no SendGrid route."""
    sendgrid_per_second: float | None = None
    sendgrid_per_minute: float | None = None
    sendgrid_connections: int = Field(default=512, ge=1)
    sendgrid_in_flight: int = Field(default=768, ge=1)
    """More than connections, so that some are claimed and settled while others are sent."""
    smtp: str = ""
    """``host:port`` of the SMTP relay; empty: no SMTP route."""
    smtp_hostname: str = "localhost"
    """Our name in EHLO."""
    smtp_security: SmtpTls = SmtpTls.STARTTLS
    smtp_user: str = ""
    smtp_password: SecretStr = SecretStr("")
    smtp_per_second: float | None = None
    smtp_per_minute: float | None = None
    smtp_connections: int = Field(default=32, ge=1)
    """Postfix lets a client have 50 unless told otherwise (smtpd_client_connection_count_limit)."""
    smtp_in_flight: int = Field(default=320, ge=1)
    """Several for each connection: one goes out behind the other's dot, others are claimed or
    settled meanwhile."""
    critical_reserve: float = Field(default=0.1, ge=0, lt=1)
    """The share of each account's burst that the critical lane alone may take."""
    allow_private: bool = False
    """Whether providers may be at addresses that are not public: for a simulator or a relay."""
    public_url: str = ""
    """``https://…`` of the receiver as the world sees it, for unsubscribe links; empty: none."""
    unsubscribe_secret: UnsubscribeSecret = SecretStr("")
    slots: Path | None = None
    """A folder in which each delivery process shows how many of its request slots are in use."""

    def gathers_for(self) -> timedelta:
        """A critical message waits for no other."""
        longest = _CRITICAL_BUFFER if self.lane is Lane.CRITICAL else self.buffer_timeout
        return min(self.buffer_timeout, longest)

    def accounts(self) -> tuple[AccountSettings, ...]:
        """The accounts that routes may name: ``sendgrid`` / ``main`` and ``smtp`` / ``main``."""
        found = []
        if self.sendgrid_key.get_secret_value():
            found.append(
                AccountSettings(
                    Route("sendgrid", "main"),
                    self._limits(self.sendgrid_per_second, self.sendgrid_per_minute),
                    self.sendgrid_in_flight,
                    partial(
                        sendgrid_account,
                        self.sendgrid_url,
                        self.sendgrid_key.get_secret_value(),
                        self.sendgrid_connections,
                        self.allow_private,
                    ),
                )
            )
        if self.smtp:
            found.append(
                AccountSettings(
                    Route("smtp", "main"),
                    self._limits(self.smtp_per_second, self.smtp_per_minute),
                    self.smtp_in_flight,
                    partial(
                        smtp_account,
                        self.smtp,
                        self.smtp_hostname,
                        self.smtp_security,
                        (self.smtp_user, self.smtp_password.get_secret_value()),
                        self.smtp_connections,
                        self.allow_private,
                    ),
                )
            )
        return tuple(found)

    def _limits(self, per_second: float | None, per_minute: float | None) -> Limits:
        limits = []
        if per_second is not None:
            limits.append(Limit(per_second))
        if per_minute is not None:
            limits.append(Limit(per_minute, timedelta(minutes=1)))
        return Limits(tuple(limits), (), self.critical_reserve)


class IngestSettings(JobSettings):
    """The webhook-ingest job."""

    checkpoint_interval: timedelta = timedelta(seconds=5)
    """Of webhook-ingest: what came after the last checkpoint is taken in once more after a failure,
    to the same rows. Nothing waits for it."""
    clickhouse: SecretStr
    """``http[s]://user:password@host:port[/database]``."""
    redis: SecretStr = SecretStr("")
    """Where the send ledger is. Empty: webhooks are taken in all the same, but settle no unknown
    outcome, and the job says so at its start; a person settles them (``fanfare unknowns``)."""
    reconcile_grace: timedelta = timedelta(seconds=2)
    """Until an unknown is first looked after; waits double from there up to five minutes."""
    reconcile_patience: timedelta = timedelta(days=7)
    """How long webhooks may settle an unknown."""
    ingest_group: str = "fanfare-webhook-ingest"
    """Kafka consumer group; the lag of the books is measured by its committed offsets."""
    flush_after: timedelta = timedelta(milliseconds=500)
    batch_rows: int = Field(default=20_000, ge=1)


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
