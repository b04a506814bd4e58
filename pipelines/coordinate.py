"""The shell around coordinate: loads a run's memory, steps, saves, emits."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Protocol

from pyflink.common import Types
from pyflink.datastream import KeyedProcessFunction, RuntimeContext
from pyflink.datastream.state import MapStateDescriptor, ValueStateDescriptor

from pipelines.dead_letters import DeadLetterGate
from schemas.codec import decode, decode_state, encode, name_of, to_millis
from schemas.errors import (
    Corrupt,
    CorruptPage,
    FanfareError,
    MalformedRecord,
    Unavailable,
    UnknownSchema,
)
from schemas.ids import LegId, ObjectId
from schemas.reasons import RunStatus
from schemas.records import CampaignSpec, Command, CommandKind, Outcomes, PageResult
from schemas.snapshot import Manifest, PageBody, PageIndex
from schemas.state import PageState, RunState
from transforms.campaign_file import validate_spec
from transforms.coordinate import (
    CoordinatePolicy,
    Coordinator,
    Effects,
    LaunchFacts,
    PageKey,
    RunMemory,
)
from transforms.examine import unrenderable
from transforms.metrics import COORDINATE, COORDINATE_GROUP

log = logging.getLogger(__name__)


class OpenSnapshot(Protocol):
    """An opened snapshot."""

    @property
    def manifest(self) -> Manifest:
        """What the snapshot holds."""

    def read_index(self, shard: int, page: int) -> PageIndex:
        """Ids of a page. Raises ``CorruptPage``."""

    def read_body(self, shard: int, page: int) -> PageBody:
        """Addresses and attributes of a page. Raises ``CorruptPage``."""


class Snapshots(Protocol):
    """Where specs are put and manifests are read."""

    def put_object(self, kind: str, content: bytes) -> ObjectId:
        """Store bytes under their hash."""

    def open_snapshot(self, name: str) -> OpenSnapshot:
        """A snapshot.

        Raises:
            MissingSnapshot: there is none.
        """


class Registry(Protocol):
    """What Redis must know of a run before anything of it may be sent."""

    def publish(
        self,
        tenant: str,
        run: str,
        version: int,
        status: RunStatus,
        rate_per_second: float | None,
        deadline: datetime,
    ) -> None:
        """Let everybody know the run's status; an older version changes nothing.

        Raises:
            Unavailable: not everybody knows; try again.
        """

    def create_ledger(
        self,
        tenant: str,
        run: str,
        legs: Iterable[str],
        shard_counts: tuple[int, ...],
        dataset: str,
    ) -> None:
        """Create the run's ledgers, full length; what exists as ``dataset`` is left alone.

        Raises:
            Unavailable: not all exist; try again.
            Corrupt: one exists as another.
        """


Examine = Callable[[CampaignSpec, Manifest], Iterable[str]]
"""The problems of a definition with the snapshot that it names."""


@dataclass(frozen=True, slots=True)
class CoordinateParts:
    """What coordinate is given; factories, called once where the operator opens."""

    snapshots: Callable[[], Snapshots]
    registry: Callable[[], Registry]
    examine: Examine
    policy: CoordinatePolicy
    dead_letter_ratio: float
    dead_letter_window: int


_TICK = timedelta(seconds=1)
_SOON = timedelta(milliseconds=200)


class CoordinateOperator(KeyedProcessFunction):  # type: ignore[misc]
    """Keyed by run. In: commands, page results, outcomes. Out: orders, closings, audit events."""

    def __init__(self, parts: CoordinateParts) -> None:
        self._parts = parts

    def open(self, runtime_context: RuntimeContext) -> None:
        """Connect; memories are loaded at first touch."""
        parts = self._parts
        self._run_state = runtime_context.get_state(
            ValueStateDescriptor("run", Types.PICKLED_BYTE_ARRAY())
        )
        self._page_state = runtime_context.get_map_state(
            MapStateDescriptor("pages", Types.STRING(), Types.PICKLED_BYTE_ARRAY())
        )
        self._memories: dict[str, RunMemory] = {}
        self._snapshots = parts.snapshots()
        self._registry = parts.registry()
        self._gate = DeadLetterGate("coordinate", parts.dead_letter_ratio, parts.dead_letter_window)
        self._armed: dict[str, int] = {}
        metrics = runtime_context.get_metrics_group().add_group(COORDINATE_GROUP)
        self._metrics = {name: metrics.counter(name) for name in COORDINATE}

    def process_element(self, value: bytes, ctx: KeyedProcessFunction.Context) -> Iterator[bytes]:
        """Step the run that the record is about."""
        now = datetime.now(UTC)
        key: str = ctx.get_current_key()
        memory = self._load(key)
        coordinator = Coordinator(memory, self._parts.policy)
        try:
            effects = self._step(coordinator, value, now)
        except MalformedRecord as error:
            data = bytes(value)
            self._metrics["malformed"].inc()
            yield self._gate.letter(data, error, now, step="read", source="coordinate's topics")
            return
        self._gate.good()
        yield from self._carry_out(coordinator, effects, now)
        self._save(memory)
        self._arm(key, coordinator, ctx, now)

    def on_timer(self, timestamp: int, ctx: KeyedProcessFunction.OnTimerContext) -> Iterator[bytes]:
        """A tick of the run's clock."""
        now = datetime.now(UTC)
        key: str = ctx.get_current_key()
        # A timer kept in state across a restart must not start a second chain of ticks.
        if self._armed.get(key, timestamp) != timestamp:
            return
        self._armed.pop(key, None)
        memory = self._load(key)
        coordinator = Coordinator(memory, self._parts.policy)
        yield from self._carry_out(coordinator, coordinator.on_tick(now), now)
        self._save(memory)
        self._arm(key, coordinator, ctx, now)

    def _step(self, coordinator: Coordinator, value: bytes, now: datetime) -> Effects:
        data = bytes(value)
        match name_of(data):
            case "Command":
                command = decode(data, Command)
                self._metrics["commands"].inc()
                return coordinator.on_command(command, now, self._facts(command, now))
            case "PageResult":
                return coordinator.on_result(decode(data, PageResult), now)
            case "Outcomes":
                return coordinator.on_outcomes(decode(data, Outcomes).require_sound(), now)
            case other:
                raise UnknownSchema(
                    f"coordinate takes Command, PageResult and Outcomes, got {other or 'bytes'} "
                    f"beginning {data[:10].hex(' ')!r}"
                )

    def _facts(self, command: Command, now: datetime) -> LaunchFacts | None:
        spec = command.launch
        if command.kind is not CommandKind.LAUNCH or spec is None:
            return None
        problems = [str(problem) for problem in validate_spec(spec, now)]
        if (spec.tenant, spec.run) != (command.tenant, command.run):
            problems.append("launch: tenant and run differ from the command's")
        if problems:
            return LaunchFacts(ObjectId(""), (), tuple(problems))
        try:
            snapshot = self._snapshots.open_snapshot(spec.snapshot)
        except FanfareError as error:
            return LaunchFacts(ObjectId(""), (), (str(error),))
        manifest = snapshot.manifest
        problems = list(self._parts.examine(spec, manifest))
        try:
            problems = problems or list(unrenderable(spec, _pages(spec, snapshot)))
        except FanfareError as error:
            problems = [f"the templates can't be tried: {error}"]
        spec_id = self._snapshots.put_object("spec", encode(spec))
        counts = tuple(manifest.shard_size(shard) for shard in range(manifest.shards))
        return LaunchFacts(spec_id, counts, tuple(problems))

    def _carry_out(
        self, coordinator: Coordinator, effects: Effects, now: datetime
    ) -> Iterator[bytes]:
        yield from self._emit(effects)
        if effects.publish:
            self._publish(coordinator, now)
        if effects.create_ledger and self._create_ledger(coordinator):
            after = coordinator.on_ledger_created(now)
            yield from self._emit(after)
            if after.publish:
                self._publish(coordinator, now)

    def _emit(self, effects: Effects) -> Iterator[bytes]:
        self._metrics["orders"].inc(len(effects.orders))
        self._metrics["reorders_of_silent_pages"].inc(effects.silent)
        self._metrics["commands_refused"].inc(sum(not one.accepted for one in effects.events))
        for record in (*effects.orders, *effects.closings, *effects.events):
            yield encode(record)

    def _publish(self, coordinator: Coordinator, now: datetime) -> None:
        run = coordinator.memory.run
        if run is None:
            return
        try:
            self._registry.publish(
                run.tenant, run.run, run.version, run.status, run.rate_per_second, run.deadline
            )
        except Unavailable as error:
            self._metrics["status_unpublished"].inc()
            log.warning("run %s: its status waits to be published: %s", run.run, error)
            return
        coordinator.on_published(run.version, now)

    def _create_ledger(self, coordinator: Coordinator) -> bool:
        run = coordinator.memory.run
        if run is None:
            return False
        try:
            self._registry.create_ledger(
                run.tenant,
                run.run,
                [leg.leg for leg in run.legs],
                run.shard_counts,
                run.spec[:16],
            )
        except (Unavailable, Corrupt) as error:
            log.error("run %s: its ledger waits to be created: %s", run.run, error)
            return False
        return True

    def _load(self, key: str) -> RunMemory:
        memory = self._memories.get(key)
        if memory is None:
            memory = RunMemory()
            kept = self._run_state.value()
            if kept is not None:
                memory.run = memory.saved = decode_state(bytes(kept), RunState)
                memory.pages = {
                    page_key(name): decode_state(bytes(data), PageState)
                    for name, data in self._page_state.items()
                }
                memory.recount()
            self._memories[key] = memory
        return memory

    def _save(self, memory: RunMemory) -> None:
        if memory.run is not None and memory.run is not memory.saved:
            self._run_state.update(encode(memory.run))
            memory.saved = memory.run
        for key in memory.dirty:
            page = memory.pages.get(key)
            if page is None:
                self._page_state.remove(page_name(key))
            else:
                self._page_state.put(page_name(key), encode(page))
        memory.dirty.clear()

    def _arm(
        self, key: str, coordinator: Coordinator, ctx: KeyedProcessFunction.Context, now: datetime
    ) -> None:
        run = coordinator.memory.run
        if run is None:
            return
        busy = coordinator.closing or coordinator.unpublished(now)
        if run.status.terminal and not busy and not coordinator.memory.open:
            self._memories.pop(key, None)
            return
        if key in self._armed:
            return
        at = to_millis(now + (_SOON if busy or not run.ledger_ready else _TICK))
        self._armed[key] = at
        ctx.timer_service().register_processing_time_timer(at)


def _pages(spec: CampaignSpec, snapshot: OpenSnapshot) -> Iterator[tuple[list[str], PageBody]]:
    """The pages that can be read; the others are named when their people are decided."""
    for entry in snapshot.manifest.pages:
        try:
            ids = snapshot.read_index(entry.shard, entry.page).recipient_ids
            body = snapshot.read_body(entry.shard, entry.page)
        except CorruptPage as error:
            log.error("run %s: its templates can't be tried on a page: %s", spec.run, error)
        else:
            yield ids, body


def page_name(key: PageKey) -> str:
    """The state key of a page."""
    leg, shard, page = key
    return f"{leg}/{shard}/{page}"


def page_key(name: str) -> PageKey:
    """What ``page_name`` named."""
    leg, shard, page = name.rsplit("/", 2)
    return LegId(leg), int(shard), int(page)
