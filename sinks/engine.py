"""Delivery's engine: one thread, one event loop, and the queues to the operator's thread.

The operator hands over sends and collects what became of them; both only touch queues. What the
loop does with a send is ``sinks.delivery_loop``'s.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence

import uvloop

from schemas.message import Provider
from schemas.pages import bitmap_from
from schemas.records import Route, Send
from sinks.delivery_loop import DeliveryLoop, EnginePolicy, FullLedger, Shaper
from sinks.delivery_pages import Store
from sinks.delivery_records import records_of
from sinks.delivery_work import Completion, Key
from transforms.delivery import Collected
from transforms.ledger import LedgerRef, Seen
from transforms.metrics import DELIVERY

log = logging.getLogger(__name__)

_YOUNG_OBJECTS = 20_000
"""Objects between two looks for cycles: of 700, as usual, most looks find messages in flight."""
_GRACE_S = 10.0
"""How much longer than the loop's own limit its thread is waited for."""


class DeliveryEngine:
    """See the module. All public methods belong to the operator's thread.

    The factories are called in the loop's thread.
    """

    def __init__(
        self,
        policy: EnginePolicy,
        ledger: Callable[[], FullLedger],
        shaper: Callable[[], Shaper],
        accounts: Callable[[], Sequence[tuple[Route, Provider, int]]],
        store: Callable[[], Store],
    ) -> None:
        self._policy = policy
        self._make = (ledger, shaper, accounts, store)
        self._inbox: deque[Callable[[DeliveryLoop], None]] = deque()
        self._keys: dict[int, Key] = {}
        self._counts = dict.fromkeys(DELIVERY, 0)
        self._delivery: DeliveryLoop | None = None
        self._event_loop: asyncio.AbstractEventLoop | None = None
        self._failure: BaseException | None = None
        self._started = threading.Event()
        self._thread = threading.Thread(target=self._main, name="delivery-loop", daemon=True)

    def start(self) -> None:
        """Start the loop; raises what kept it from starting."""
        self._thread.start()
        self._started.wait()
        self._raise_failure()

    def take_over(self, key: int) -> None:
        """Before anything else of a delivery key."""
        self._keys[key] = Key(key)

    def submit(self, key: int, name: str, send: Send, mark: str | None) -> None:
        """Owe a send's recipients an outcome; a send that is owed already is nothing new.

        ``mark`` is how far the send's ledger was seen, as ``collect`` last told it.
        """
        known = self._keys[key]
        if name in known.owed:
            return
        count = bitmap_from(send.ordinals).bit_count()
        self._counts["sends"] += 1
        if count == 0:
            known.empty.append(name)
            return
        known.owed[name] = count
        seen = _mark_from(mark) if mark else None
        self._call(lambda loop: loop.admit(known, name, send, seen))

    def collect(self, key: int) -> Collected:
        """What is done since the last call.

        Raises what ended the loop, and ``Fenced`` where another process owns the key now.
        """
        self._raise_failure()
        known = self._keys[key]
        if known.fenced is not None:
            raise known.fenced
        finished, known.empty = known.empty, []
        done: list[Completion] = []
        while known.outbox:
            completion = known.outbox.popleft()
            done.append(completion)
            name = completion.work.name
            known.owed[name] -= 1
            if not known.owed[name]:
                del known.owed[name]
                finished.append(name)
        marks = {}
        for ref, desk in known.desks.copy().items():
            seen = desk.seen
            if seen is not None and seen != desk.marked:
                desk.marked = seen
                marks[_ledger_name(ref)] = f"{seen.dataset}:{seen.seq}"
        moving = bool(done) or known.under_way > 0 or bool(self._inbox)
        if not moving and known.owed and self._delivery is not None:
            moving = self._delivery.moving()
        return Collected(tuple(records_of(done)), tuple(finished), marks, len(known.owed), moving)

    def counts(self) -> Mapping[str, int]:
        """Counters since the start, by the names of ``transforms.metrics.DELIVERY``."""
        return self._counts

    def stop(self) -> None:
        """Start nothing new, let what is in flight finish, end the loop."""
        if self._thread.is_alive():
            log.info("delivery's loop is to end")
            self._call(DeliveryLoop.begin_stop)
            self._thread.join(self._policy.stop_timeout.total_seconds() + _GRACE_S)
            if self._thread.is_alive():
                log.error("delivery's loop does not end; its ledgers fence it from now on")

    def _call(self, action: Callable[[DeliveryLoop], None]) -> None:
        self._inbox.append(action)
        if self._event_loop is not None and self._thread.is_alive():
            try:
                self._event_loop.call_soon_threadsafe(self._drain)
            except RuntimeError:
                # The loop ended meanwhile: `collect` tells why, and nothing is lost by it.
                log.info("delivery's loop has ended")

    def _raise_failure(self) -> None:
        if self._failure is not None:
            raise RuntimeError("delivery's loop ended") from self._failure

    def _main(self) -> None:
        gc.set_threshold(_YOUNG_OBJECTS, *gc.get_threshold()[1:])
        try:
            with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
                self._event_loop = runner.get_loop()
                runner.run(self._run())
        except BaseException as error:  # the operator raises it at its next look
            log.exception("delivery's loop ended")
            self._failure = self._failure or error
        finally:
            self._started.set()

    async def _run(self) -> None:
        make_ledger, make_shaper, make_accounts, make_store = self._make
        delivery = DeliveryLoop(
            self._policy,
            make_ledger(),
            make_shaper(),
            make_accounts(),
            make_store(),
            self._counts,
            self._fail,
        )
        async with delivery.running():
            self._delivery = delivery
            self._started.set()
            self._drain()
            await delivery.stopped()

    def _drain(self) -> None:
        delivery = self._delivery
        if delivery is None:
            return
        while self._inbox:
            action = self._inbox.popleft()
            try:
                action(delivery)
            except Exception as error:  # a defect: the job must fail, not forget a send
                self._fail(error)

    def _fail(self, error: BaseException) -> None:
        """Nothing new starts, and the operator hears of it at its next look."""
        log.error("delivery fails", exc_info=error)
        self._failure = self._failure or error
        if self._delivery is not None:
            self._delivery.begin_stop()


def _ledger_name(ref: LedgerRef) -> str:
    """As ``transforms.delivery.ledger_name`` of its sends."""
    return f"{ref.tenant}/{ref.run}/{ref.leg}/{ref.shard}"


def _mark_from(mark: str) -> Seen:
    dataset, _, seq = mark.rpartition(":")
    return Seen(dataset, int(seq))


__all__: Sequence[str] = ["DeliveryEngine", "EnginePolicy"]
