"""A producer as somebody outside writes it: kafka-python and fastavro, nothing of Fanfare."""

from __future__ import annotations

import io
import json
import time
import uuid
from pathlib import Path
from typing import Any

import fastavro
from fastavro.schema import fingerprint, to_parsing_canonical_form
from kafka import KafkaProducer

AVRO = Path(__file__).parents[2] / "schemas" / "avro"


class Writer:
    """Avro's single-object encoding: C3 01, the schema's CRC-64-AVRO fingerprint, the body."""

    def __init__(self, name: str) -> None:
        raw = json.loads((AVRO / f"{name}.avsc").read_text())
        canonical = to_parsing_canonical_form(raw)
        self.header = b"\xc3\x01" + bytes.fromhex(fingerprint(canonical, "CRC-64-AVRO"))
        self.schema = fastavro.parse_schema(raw)

    def __call__(self, record: dict[str, Any]) -> bytes:
        out = io.BytesIO()
        fastavro.schemaless_writer(out, self.schema, record)
        return self.header + out.getvalue()


COMMAND = Writer("Command")
CONSENT = Writer("ConsentChange")


def now_ms() -> int:
    return time.time_ns() // 1_000_000


class Producer:
    """Launches, commands and consent changes by the documented contract."""

    def __init__(self, servers: str) -> None:
        self.kafka = KafkaProducer(bootstrap_servers=servers, acks="all", linger_ms=5)

    def put(self, topic: str, *values: bytes) -> None:
        for value in values:
            self.kafka.send(topic, value).get(timeout=30)

    def command(
        self,
        kind: str,
        tenant: str,
        run: str,
        command_id: str | None = None,
        **fields: Any,
    ) -> str:
        """Write a command and return its id."""
        command_id = command_id or str(uuid.uuid4())
        record = {
            "command_id": command_id,
            "tenant": tenant,
            "run": run,
            "kind": kind,
            "issued_at": now_ms(),
            "issued_by": "a plain producer",
            **fields,
        }
        self.put("fanfare.commands", COMMAND(record))
        return command_id

    def consent(self, tenant: str, words: list[tuple[str, str, str, str]]) -> None:
        """Write (recipient, channel, topic, status)."""
        for recipient, channel, topic, status in words:
            change = {
                "change_id": str(uuid.uuid4()),
                "tenant": tenant,
                "recipient_id": recipient,
                "channel": channel,
                "topic": topic,
                "status": status,
                "at": now_ms(),
                "source": "a plain producer",
            }
            self.kafka.send("fanfare.consent", CONSENT(change))
        self.kafka.flush()


def campaign(tenant: str, run: str, snapshot: str, **changes: Any) -> dict[str, Any]:
    """A CampaignSpec as a plain dict: one e-mail leg by SendGrid, an hour to its deadline."""
    leg = {
        "leg": "email",
        "channel": "email",
        "routes": [{"provider": "sendgrid", "account": "main"}],
        "sender_address": "offers@news.example.com",
        "sender_name": "Lindgren & Söhne",
        "reply_to": None,
        "subject": "Spring, {{ first_name }}",
        "html": None,
        "text": "Hello {{ first_name }} of {{ city }}.",
    }
    leg.update({name: changes.pop(name) for name in ("subject", "html", "text") if name in changes})
    providers = changes.pop("providers", ["sendgrid"])
    leg["routes"] = [{"provider": provider, "account": "main"} for provider in providers]
    return {
        "tenant": tenant,
        "run": run,
        "campaign": "spring-offers",
        "snapshot": snapshot,
        "category": "promo",
        "topic": "offers",
        "lane": "promotional",
        "legs": [leg],
        "start_at": None,
        "deadline": now_ms() + 3_600_000,
        "quiet_hours": None,
        "when_zone_unknown": "assume",
        "fallback_zone": "Europe/Berlin",
        "caps": [],
        "holdout_percent": 0.0,
        "rate_per_second": None,
        "valid_for": 600_000,
        "defaults": {"first_name": "friend", "city": "your town"},
        **changes,
    }
