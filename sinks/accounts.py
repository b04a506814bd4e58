"""Providers' accounts: what a route may name, its limits and its adapter."""

from __future__ import annotations

import ssl
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from schemas.message import Provider
from schemas.records import Route
from sinks.providers.sendgrid import SendGrid
from sinks.providers.smtp import Smtp
from sinks.shaping import Limits
from sinks.smtp_client import SmtpTls


@dataclass(frozen=True, slots=True)
class AccountSettings:
    """One account. ``make`` is called in the loop that uses the adapter."""

    route: Route
    limits: Limits
    in_flight: int
    make: Callable[[], Provider]


def sendgrid_account(base_url: str, key: str, connections: int, allow_private: bool) -> Provider:
    """The adapter of a SendGrid account."""
    return SendGrid(
        key,
        base_url=base_url,
        connections=connections,
        tls=ssl.create_default_context() if base_url.startswith("https:") else None,
        allow_private=allow_private,
    )


def smtp_account(
    address: str,
    hostname: str,
    security: SmtpTls,
    credentials: tuple[str, str],
    connections: int,
    allow_private: bool,
) -> Provider:
    """The adapter of an SMTP relay at ``host:port``."""
    host, _, port = address.rpartition(":")
    return Smtp(
        host,
        int(port),
        hostname=hostname,
        security=security,
        credentials=credentials if credentials[0] else None,
        connections=connections,
        tls=None if security is SmtpTls.NONE else ssl.create_default_context(),
        allow_private=allow_private,
    )


def open_accounts(accounts: Sequence[AccountSettings]) -> list[tuple[Route, Provider, int]]:
    """The adapters of all accounts, and how many requests each may have in flight."""
    return [(one.route, one.make(), one.in_flight) for one in accounts]
