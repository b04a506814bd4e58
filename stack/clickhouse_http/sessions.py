"""Sessions: handles that outlive a request, by user and session id.

All methods run on the event loop; closing a handle is cheap enough for it.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from datetime import timedelta
from typing import Final

from stack.clickhouse_http.engine import Engine, Handle
from stack.clickhouse_http.failures import SESSION_IS_LOCKED, SESSION_NOT_FOUND, QueryFailed

DEFAULT_TIMEOUT: Final = timedelta(seconds=60)
MAX_TIMEOUT: Final = timedelta(seconds=3600)
MAX_SESSIONS: Final = 1000


@dataclass(slots=True, eq=False)
class Session:
    """One session. ``busy`` while a request runs in it."""

    id: str
    handle: Handle
    timeout: timedelta
    busy: bool = True
    expiry: asyncio.TimerHandle | None = None


class Sessions:
    """The open sessions. Above MAX_SESSIONS the one that is idle longest is closed."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._open: dict[str, Session] = {}

    def __len__(self) -> int:
        return len(self._open)

    def acquire(self, session_id: str, timeout: timedelta, must_exist: bool) -> Session:
        """Return the session, new if need be, and lock it.

        Raises QueryFailed: 373 if a request runs in it, 372 if it must exist and doesn't.
        """
        session = self._open.pop(session_id, None)
        if session is None:
            if must_exist:
                raise QueryFailed.of(SESSION_NOT_FOUND, f"Session {session_id} not found")
            session = Session(session_id, self._engine.open(), timeout)
        elif session.busy:
            self._open[session_id] = session
            raise QueryFailed.of(
                SESSION_IS_LOCKED, f"Session {session_id} is locked by a concurrent client"
            )
        self._open[session_id] = session  # last in order: youngest
        session.busy, session.timeout = True, timeout
        if session.expiry is not None:
            session.expiry.cancel()
            session.expiry = None
        self._evict()
        return session

    def release(self, session: Session) -> None:
        """Unlock a session; it expires when it is idle for its timeout. Safe to call twice."""
        if not session.busy:
            return
        session.busy = False
        loop = asyncio.get_running_loop()
        session.expiry = loop.call_later(session.timeout.total_seconds(), self._expire, session)

    def close(self) -> None:
        """Close all sessions, whether they are idle or not."""
        for session in self._open.values():
            if session.expiry is not None:
                session.expiry.cancel()
            session.handle.close()
        self._open.clear()

    def _expire(self, session: Session) -> None:
        if not session.busy and self._open.get(session.id) is session:
            del self._open[session.id]
            session.handle.close()

    def _evict(self) -> None:
        if len(self._open) <= MAX_SESSIONS:
            return
        idle = next((s for s in self._open.values() if not s.busy), None)
        if idle is not None:
            if idle.expiry is not None:
                idle.expiry.cancel()
            self._expire(idle)
