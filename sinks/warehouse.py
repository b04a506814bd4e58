"""ClickHouse as the webhook-ingest job sees it: batches in, one question out."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime

from clickhouse_connect.driver.client import Client

from schemas.errors import Unavailable
from schemas.tables import RUN_EVENTS
from sinks.clickhouse import Batch, asking, connect, create_tables, write_progress

JOB = "webhook-ingest"


class Warehouse:
    """Connects at first need, makes the tables, and connects anew after a failure.

    Every method raises Unavailable when ClickHouse does not answer: try again later; and Refused
    when somebody must look. For one thread.
    """

    def __init__(self, url: str) -> None:
        self._url = url
        self._client: Client | None = None

    def batch(self) -> Batch:
        """An empty batch."""
        return Batch()

    def write(self, batch: Batch) -> int:
        """Write a batch; how many rows. May be repeated."""
        try:
            return batch.write(self._connected())
        except Unavailable:
            self.close()
            raise

    def snapshot_of(self, tenant: str, run: str) -> str | None:
        """The snapshot of a run; None while no event of the run that names one is known."""
        try:
            rows = asking(
                self._connected(),
                f"SELECT snapshot FROM {RUN_EVENTS.name} WHERE tenant = {{tenant:String}} "  # noqa: S608
                "AND run = {run:String} AND snapshot != '' ORDER BY at LIMIT 1",
                {"tenant": tenant, "run": run},
            ).result_rows
        except Unavailable:
            self.close()
            raise
        return str(rows[0][0]) if rows else None

    def progress(
        self,
        writer: int,
        newest: Mapping[str, datetime],
        records: Mapping[str, int],
        buffered: int,
        now: datetime,
    ) -> None:
        """Say how far ingestion is: newest time and number of records by name since the start."""
        try:
            write_progress(
                self._connected(), JOB, writer, dict(newest), dict(records), buffered, now
            )
        except Unavailable:
            self.close()
            raise

    def _connected(self) -> Client:
        if self._client is None:
            client = connect(self._url)
            create_tables(client)
            self._client = client
        return self._client

    def close(self) -> None:
        """Let the connection go; the next use makes one."""
        client, self._client = self._client, None
        if client is not None:
            client.close()
