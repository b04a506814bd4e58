"""Settings of the provider simulator, all of which can be changed while it runs.

Times are integers or floats in the unit their name ends with (``_ms``, ``_s``); rates and
proportions are fractions between 0 and 1. Unknown fields and wrong types are refused, and the
refusal names the field by its dotted path (``sendgrid.faults.ambiguous_rate``).
"""

from __future__ import annotations

import ipaddress
import re
from typing import Annotated, Any, Literal, Self
from urllib.parse import urlsplit

import orjson
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from schemas.errors import InvalidInput

Rate = Annotated[float, Field(ge=0.0, le=1.0)]
NonNegative = Annotated[float, Field(ge=0.0)]


class ConfigError(InvalidInput):
    """A setting is unknown, of the wrong type or out of range; the message names it."""

    def __init__(self, problems: list[tuple[str, str]]) -> None:
        self.problems = problems
        super().__init__("; ".join(f"{field}: {message}" for field, message in problems))


class _Settings(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class Latency(_Settings):
    """How long an answer takes: ``fixed`` ms, ``uniform`` min..max, or ``lognormal`` median."""

    kind: Literal["none", "fixed", "uniform", "lognormal"] = "none"
    ms: NonNegative = 0.0
    min_ms: NonNegative = 0.0
    max_ms: NonNegative = 0.0
    median_ms: Annotated[float, Field(gt=0.0)] = 50.0
    sigma: NonNegative = 0.5

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.min_ms > self.max_ms:
            raise ValueError(f"min_ms {self.min_ms} is greater than max_ms {self.max_ms}")
        return self


class RateLimit(_Settings):
    """Requests (SMTP: messages) allowed per key in each calendar second and minute."""

    per_second: Annotated[int, Field(ge=0)] | None = None
    per_minute: Annotated[int, Field(ge=0)] | None = None
    retry_after: bool = False


class Rule(_Settings):
    """What happens to addresses in which ``pattern`` (a regular expression) is found.

    ``reject`` refuses at once (HTTP 400, SMTP ``smtp_code``); the others accept the message and
    decide its webhooks.
    """

    pattern: Annotated[str, Field(min_length=1)]
    action: Literal["reject", "bounce", "dropped", "spamreport", "unsubscribe"] = "reject"
    smtp_code: Annotated[int, Field(ge=400, le=599)] = 550
    message: str = "address rejected"

    @field_validator("pattern")
    @classmethod
    def _compiles(cls, value: str) -> str:
        try:
            re.compile(value)
        except re.error as error:
            raise ValueError(f"not a regular expression: {error}") from error
        return value


class Outage(_Settings):
    """A time without service: while ``active``, or from ``from_ms`` until ``until_ms`` (epoch)."""

    active: bool = False
    from_ms: int | None = None
    until_ms: int | None = None
    mode: Literal["error", "reset", "hang"] = "error"
    status: Annotated[int, Field(ge=400, le=599)] = 503


class Faults(_Settings):
    """At most one of these strikes a request; the rates add up to at most 1.

    ``error_rates`` maps a status (SMTP: reply code after DATA) to its rate: refused before
    accepting. ``ambiguous``: accepted, then answered with ``ambiguous_status``. ``hang_before``
    and ``hang_after``: never answered, before or after accepting. ``reset_before`` (in the
    middle of the body) and ``reset_after``: connection reset. ``slow``: accepted, and the
    answer dribbles out ``slow_chunk_bytes`` every ``slow_interval_ms``.
    """

    error_rates: dict[str, Rate] = Field(default_factory=dict)
    ambiguous_rate: Rate = 0.0
    ambiguous_status: Annotated[int, Field(ge=400, le=599)] = 500
    hang_before_rate: Rate = 0.0
    hang_after_rate: Rate = 0.0
    reset_before_rate: Rate = 0.0
    reset_after_rate: Rate = 0.0
    slow_rate: Rate = 0.0
    slow_chunk_bytes: Annotated[int, Field(ge=1)] = 1
    slow_interval_ms: NonNegative = 100.0

    @field_validator("error_rates")
    @classmethod
    def _statuses(cls, value: dict[str, float]) -> dict[str, float]:
        for status in value:
            if not re.fullmatch(r"[45]\d\d", status):
                raise ValueError(f"{status!r} is not a status between 400 and 599")
        return value

    @model_validator(mode="after")
    def _at_most_one(self) -> Self:
        total = sum(self.error_rates.values()) + sum(
            (
                self.ambiguous_rate,
                self.hang_before_rate,
                self.hang_after_rate,
                self.reset_before_rate,
                self.reset_after_rate,
                self.slow_rate,
            )
        )
        if total > 1.0 + 1e-9:
            raise ValueError(f"the rates add up to {total:g}, more than 1")
        return self


class _Provider(_Settings):
    latency: Latency = Field(default_factory=Latency)
    rate_limit: RateLimit = Field(default_factory=RateLimit)
    outage: Outage = Field(default_factory=Outage)
    rules: tuple[Rule, ...] = ()


class SendGridSettings(_Provider):
    """The HTTP provider."""

    faults: Faults = Field(default_factory=Faults)
    max_body_bytes: Annotated[int, Field(ge=1)] = 30 * 1024 * 1024


class SmtpSettings(_Provider):
    """The SMTP provider. ``rcpt_error_rates`` maps a reply code to its rate at RCPT."""

    faults: Faults = Field(default_factory=lambda: Faults(ambiguous_status=451))
    rcpt_error_rates: dict[str, Rate] = Field(default_factory=dict)
    max_messages_per_connection: Annotated[int, Field(ge=1)] | None = None
    max_connections: Annotated[int, Field(ge=0)] | None = None
    max_message_bytes: Annotated[int, Field(ge=1)] = 30 * 1024 * 1024
    max_recipients: Annotated[int, Field(ge=1)] = 1000
    webhooks: bool = True

    @field_validator("rcpt_error_rates")
    @classmethod
    def _codes(cls, value: dict[str, float]) -> dict[str, float]:
        for code in value:
            if not re.fullmatch(r"[45]\d\d", code):
                raise ValueError(f"{code!r} is not a reply code between 400 and 599")
        if sum(value.values()) > 1.0 + 1e-9:
            raise ValueError(f"the rates add up to {sum(value.values()):g}, more than 1")
        return value


class Proportions(_Settings):
    """What becomes of accepted messages.

    ``delivered``, ``bounce`` and ``dropped`` are fractions of the accepted and add up to at most
    1 (the rest is never heard of again). ``blocked`` is the fraction of bounces of type
    ``blocked``. The others are fractions of the delivered; a click implies an open.
    """

    delivered: Rate = 0.97
    bounce: Rate = 0.02
    dropped: Rate = 0.01
    blocked: Rate = 0.2
    deferred: Rate = 0.01
    open: Rate = 0.3
    click: Rate = 0.05
    spamreport: Rate = 0.001
    unsubscribe: Rate = 0.002

    @model_validator(mode="after")
    def _at_most_all(self) -> Self:
        total = self.delivered + self.bounce + self.dropped
        if total > 1.0 + 1e-9:
            raise ValueError(f"delivered + bounce + dropped is {total:g}, more than 1")
        return self


class WebhookSettings(_Settings):
    """The events that are sent back.

    Each event comes ``min_delay_ms`` to ``max_delay_ms`` after the one before it. ``url`` null
    sends none. A post holds up to ``batch_events`` or what came together in ``batch_ms``.
    ``duplicate_rate`` events are sent twice, ``disorder_rate`` messages have their events sent
    in reverse. Posts that are not answered 2xx are repeated with backoff until ``give_up_s``.
    ``max_pending_events`` bounds what waits; beyond it the new events are dropped and counted.
    """

    url: str | None = None
    proportions: Proportions = Field(default_factory=Proportions)
    min_delay_ms: NonNegative = 200.0
    max_delay_ms: NonNegative = 2000.0
    batch_events: Annotated[int, Field(ge=1)] = 500
    batch_ms: Annotated[float, Field(ge=1.0)] = 250.0
    duplicate_rate: Rate = 0.0
    disorder_rate: Rate = 0.0
    processed: bool = True
    signed: bool = True
    max_posts: Annotated[int, Field(ge=1)] = 8
    post_timeout_ms: Annotated[float, Field(gt=0.0)] = 10_000.0
    retry_first_ms: Annotated[float, Field(gt=0.0)] = 500.0
    retry_max_ms: Annotated[float, Field(gt=0.0)] = 60_000.0
    give_up_s: NonNegative = 86_400.0
    max_pending_events: Annotated[int, Field(ge=0)] = 2_000_000

    @field_validator("url")
    @classmethod
    def _absolute(cls, value: str | None) -> str | None:
        if value is not None:
            parts = urlsplit(value)
            if parts.scheme not in ("http", "https") or not parts.hostname:
                raise ValueError(f"{value!r} is not an http or https URL")
        return value

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.min_delay_ms > self.max_delay_ms:
            raise ValueError(
                f"min_delay_ms {self.min_delay_ms} is greater than max_delay_ms {self.max_delay_ms}"
            )
        return self


class SimulatorConfig(_Settings):
    """Everything that can be set while the simulator runs."""

    seed: int = 0
    keep_bodies: Annotated[int, Field(ge=0)] = 0
    sendgrid: SendGridSettings = Field(default_factory=SendGridSettings)
    smtp: SmtpSettings = Field(default_factory=SmtpSettings)
    webhooks: WebhookSettings = Field(default_factory=WebhookSettings)


def _merge(old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    merged = dict(old)
    for key, value in new.items():
        if key not in ("error_rates", "rcpt_error_rates") and isinstance(value, dict):
            before = merged.get(key)
            merged[key] = _merge(before, value) if isinstance(before, dict) else value
        else:
            merged[key] = value
    return merged


def updated(config: SimulatorConfig, changes: object) -> SimulatorConfig:
    """``config`` with ``changes`` (nested, only what differs; maps and lists as a whole).

    Raises ConfigError naming each field that is unknown, mistyped or out of range.
    """
    if not isinstance(changes, dict):
        raise ConfigError([("", "the settings must be a JSON object")])
    try:
        merged = _merge(config.model_dump(mode="json"), changes)
        return SimulatorConfig.model_validate_json(orjson.dumps(merged))
    except ValidationError as error:
        raise ConfigError(
            [
                (".".join(str(part) for part in problem["loc"]), problem["msg"])
                for problem in error.errors()
            ]
        ) from error


def is_loopback(url: str) -> bool:
    """Whether a URL names this machine only: ``localhost`` or a loopback address."""
    host = urlsplit(url).hostname or ""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
