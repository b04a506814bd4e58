"""Settings of the gateway, from the environment: ``FANFARE_`` and the field's name in capitals."""

from __future__ import annotations

from datetime import timedelta

from pydantic import Field, SecretStr, ValidationError
from pydantic_settings import BaseSettings, SettingsConfigDict

from schemas.errors import InvalidInput
from sinks.secrets import UnsubscribeSecret
from transforms.signatures import Key, read_key

PREFIX = "FANFARE_"
DEFAULT_TENANT = "default"


class GatewaySettings(BaseSettings):
    """What the webhook receiver needs."""

    model_config = SettingsConfigDict(env_prefix=PREFIX, frozen=True, extra="ignore")

    kafka: str
    """``host:port``, or several with commas."""
    topic_prefix: str = ""
    webhook_public_key: str = ""
    """SendGrid's verification key of the tenant ``default``: base64 DER; several with commas while
    keys are rotated."""
    webhook_keys: dict[str, list[str]] = Field(default_factory=dict)
    """The same for each tenant, as JSON: ``{"acme": ["MFkw…"]}``."""
    unsubscribe_secret: UnsubscribeSecret = SecretStr("")
    """What unsubscribe links are signed with; empty: none is accepted."""
    webhook_body_limit: int = Field(default=1_000_000, ge=1)
    """Bytes; SendGrid posts at most 768 kB, and Kafka takes values below 1 MiB."""
    webhook_body_timeout: timedelta = timedelta(seconds=15)
    webhook_in_flight: int = Field(default=1_000, ge=1)
    """Requests that may wait for the broker at once; more are answered 503."""
    kafka_timeout: timedelta = timedelta(seconds=8)
    """How long a request waits for the broker's acknowledgement before it is answered 503."""

    def keys(self) -> dict[str, tuple[Key, ...]]:
        """The verification keys of each tenant. Raises InvalidInput for what is no key."""
        written = {tenant: list(keys) for tenant, keys in self.webhook_keys.items()}
        for key in filter(None, self.webhook_public_key.replace(" ", "").split(",")):
            written.setdefault(DEFAULT_TENANT, []).append(key)
        found: dict[str, tuple[Key, ...]] = {}
        for tenant, keys in written.items():
            try:
                found[tenant] = tuple(read_key(key) for key in keys)
            except InvalidInput as error:
                raise InvalidInput(
                    f"{PREFIX}WEBHOOK_KEYS or {PREFIX}WEBHOOK_PUBLIC_KEY, "
                    f"tenant {tenant!r}: {error}"
                ) from error
        return found


def load() -> GatewaySettings:
    """The settings.

    Raises:
        InvalidInput: variables are missing or wrong; the message names each and repeats no value.
    """
    values: dict[str, str] = {}
    try:
        return GatewaySettings(**values)  # type: ignore[arg-type]
    except ValidationError as error:
        lines = [
            f"{PREFIX}{'.'.join(str(part) for part in one['loc']).upper()}: {one['msg']}"
            for one in error.errors(include_input=False, include_url=False)
        ]
        raise InvalidInput(
            "the receiver's settings can't be read from the environment: " + "; ".join(lines)
        ) from None
