"""The send ledger: what may be sent, what was sent, what nobody knows. Rules and reference model.

A ledger belongs to one run, leg and shard. It has one bit a recipient (*accepted*), created at
full length at launch, and beside it the few *open matters*, by ordinal: a **claim** (a request
may be under way), a **held** unknown (a request left, its answer never came) or a **closed**
refusal. An ordinal has the bit or a matter, never both. Three functions are the rules
(``judge``, ``settle``, ``reconciled``); ``LedgerModel`` is a whole ledger server in memory, with
the answers of ``sinks.ledger``, whose Lua scripts are compared with it step by step.

Calls
=====
A call is refused whole, changing nothing, in this order:

    meta or bitmap absent                          MissingLedger
    other dataset, or sequence behind the caller's LedgerRolledBack
    epoch behind the caller's own                  LedgerRolledBack
    epoch beyond the caller's own                  Fenced: a successor took the delivery key
    sequence beyond the caller's                   Moved: look at it and call again
    an ordinal that the ledger does not have       Corrupt

Every claim and settle that is carried out moves the sequence on by one, so of all calls made
with one sequence number **at most one is ever carried out**. This is what makes it safe to repeat
a call whose answer was lost: the lost one either moved the ledger (the repeat is told so, and
finds its own claim or its own settlement), or is void should it still arrive. Without it a
late copy of a refused claim could delete the claim of a request that has left.

Claim (generation ``g``, attempt ``a``, by ``key`` and ``epoch``)
================================================================
A claim may be asked for only while no request of attempt ``a`` has left, and a generation's next
attempt only when the one before was settled.

    found                           verdict            left behind
    ------------------------------  -----------------  ------------------------------------------
    accepted bit                    ACCEPTED           the bit
    closed, generation >= g         CLOSED             the closed
    held                            HELD               the held
    claim, this epoch, not equal    WAIT               that claim
    claim, other epoch, promotional HELD               held(in doubt), with the claim's identity
    otherwise, in this order:
      run cancelled or expired      CLOSED             closed(g, cancelled | expired)      [1]
      run not running, or unheard   NOT_RUNNING        nothing of one's own                [2]
      deadline reached              CLOSED             closed(g, expired)                  [1]
      ``valid_until`` reached       STALE              nothing of one's own                [2]
      opted out or erased           CLOSED             closed(g, failed, opted_out)        [1]
      else                          CLAIMED            claim(epoch, g, a, provider, now)   [3]

'Otherwise' is: nothing, closed of an earlier generation, a claim equal in every field, and on
the critical lane a claim of another epoch. A final refusal is recorded, not only answered, so
that its outcome survives a crash between answer and emission.

A claim in **doubt** says that an earlier request for this recipient may have arrived: the claim
was found under another epoch, or settled as ``DOUBT``. Only the critical lane goes on from there,
and never forgets it:
[1] in doubt: held(in doubt) and verdict HELD, since 'not sent' would be a guess.
[2] in doubt: the claim stays, without owner (epoch 0), so that nobody takes it for nothing.
[3] in doubt: verdict REPEATED, and the new claim is in doubt as well.

Whoever is told HELD emits ``unknown``, CLOSED that outcome, ACCEPTED ``accepted``; each time,
since the answer that told it first may have been lost.

Settle (generation ``g``, attempt ``a``, by ``key`` and ``epoch``)
=================================================================
    found                  action    answer             left behind
    ---------------------  --------  -----------------  --------------------------------------
    own claim (e, g, a)    ACCEPT    DONE               the bit
                           RELEASE   DONE               nothing; in doubt: the ownerless claim
                           DOUBT     DONE               the ownerless claim, in doubt
                           CLOSE     DONE               closed; in doubt: held, and STANDS
                           HOLD      DONE               held(no answer)
    what the same action   any       DONE               unchanged: a repeat
    would leave
    accepted bit           other     ACCEPTED           the bit
    nothing                other     NOTHING            nothing
    any other matter       any       STANDS             that matter

An outcome may be emitted after DONE; after another answer the ledger's word counts, not one's own.

Others
======
``reconcile`` (a webhook tells of the message): claim or held -> the bit. ``settle_by_hand``: the
held matter that the person saw, and no other -> the bit, or nothing (send again).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, field, replace
from enum import Enum
from hashlib import blake2b
from typing import NamedTuple, NewType

from schemas.errors import Corrupt, Fenced, LedgerRolledBack, MissingLedger
from schemas.ids import LegId, RunId, Tenant
from schemas.pages import SHARDS, delivery_key
from schemas.reasons import Lane, Outcome, Reason, RunStatus

OPT_OUT_MEMORY_MS = 20 * 60 * 1000
"""How long a claim remembers an opt-out. A decision is valid for ten minutes at most; what is
decided later knows of it by itself."""

NO_EPOCH = 0
"""The epoch of a claim that has no owner any more. Real epochs begin at 1."""

RecipientKey = NewType("RecipientKey", bytes)
"""Eight bytes that stand for a tenant's recipient in the memory of opt-outs."""


def recipient_key(tenant: str, recipient: str) -> RecipientKey:
    """The key of a recipient: a hash, so that neither Redis nor its log holds the identifier."""
    digest = blake2b(f"{tenant}\x1f{recipient}".encode(), digest_size=8).digest()
    return RecipientKey(digest)


def scope(channel: str, topic: str) -> str:
    """The name of what an opt-out covers; each part may be ``*``."""
    return f"{channel}/{topic}"


def scopes_of(channel: str, topic: str) -> tuple[str, ...]:
    """The opt-outs that forbid a message on ``channel`` and ``topic``."""
    return (scope(channel, topic), scope(channel, "*"), scope("*", topic), scope("*", "*"))


@dataclass(frozen=True, slots=True)
class LedgerRef:
    """Names one ledger."""

    tenant: Tenant
    run: RunId
    leg: LegId
    shard: int


@dataclass(frozen=True, slots=True)
class Seen:
    """How far a ledger was when it was last seen: kept by its writer, and in Flink's state."""

    dataset: str
    """Which making of the ledger; another one is another ledger."""
    seq: int


@dataclass(frozen=True, slots=True)
class Owner:
    """The one writer of the ledgers of a delivery key, as long as its epoch is the last."""

    lane: Lane
    key: int
    epoch: int


@dataclass(frozen=True, slots=True)
class Claim:
    """A request may be under way."""

    epoch: int
    generation: int
    attempt: int
    provider: str
    at_ms: int
    doubt: bool = False


@dataclass(frozen=True, slots=True)
class Held:
    """A request left and nobody knows what became of it."""

    epoch: int
    generation: int
    attempt: int
    provider: str
    at_ms: int
    reason: Reason
    """``NO_ANSWER`` or ``CLAIM_IN_DOUBT``."""


@dataclass(frozen=True, slots=True)
class Closed:
    """Refused for good in this generation; a later one may begin again."""

    epoch: int
    generation: int
    attempt: int
    outcome: Outcome
    reason: Reason
    at_ms: int


Matter = Claim | Held | Closed


class Ask(NamedTuple):
    """One recipient that a request is to leave for. Times are epoch milliseconds, exclusive."""

    ordinal: int
    generation: int
    attempt: int
    provider: str
    recipient: RecipientKey
    valid_until_ms: int
    deadline_ms: int


class VerdictKind(Enum):
    """What a claim was told; the module's first table."""

    CLAIMED = "claimed"
    REPEATED = "repeated"
    """Claimed, and an earlier request may have arrived: same ids, flagged in the outcome."""
    ACCEPTED = "accepted"
    STALE = "stale"
    NOT_RUNNING = "not_running"
    CLOSED = "closed"
    HELD = "held"
    WAIT = "wait"


class Verdict(NamedTuple):
    """The answer for one recipient; ``matter`` is what stands for CLOSED, HELD and WAIT."""

    kind: VerdictKind
    matter: Matter | None = None


CLAIMED = Verdict(VerdictKind.CLAIMED)
REPEATED = Verdict(VerdictKind.REPEATED)
ACCEPTED = Verdict(VerdictKind.ACCEPTED)
STALE = Verdict(VerdictKind.STALE)
NOT_RUNNING = Verdict(VerdictKind.NOT_RUNNING)


@dataclass(frozen=True, slots=True)
class Claims:
    """The answer to a claim: verdicts parallel to the asks."""

    seq: int
    now_ms: int
    """The ledger's own clock, by which it judged."""
    status: RunStatus | None
    """Of the run; ``None`` where it was never heard of."""
    verdicts: tuple[Verdict, ...]


@dataclass(frozen=True, slots=True)
class Moved:
    """The ledger is further than the caller knew; nothing was done."""

    seq: int


class Action(Enum):
    """What became of a claimed request."""

    ACCEPT = "accept"
    RELEASE = "release"
    """Refused, known not to be sent, and to be tried again."""
    CLOSE = "close"
    """Refused for good."""
    HOLD = "hold"
    """In doubt, and not to be tried again."""
    DOUBT = "doubt"
    """In doubt, and to be tried again with the same ids: the critical lane alone may."""


class Settlement(NamedTuple):
    """One recipient's request and its end; outcome and reason only for ``CLOSE``."""

    ordinal: int
    generation: int
    attempt: int
    action: Action
    outcome: Outcome = Outcome.FAILED
    reason: Reason = Reason.PROVIDER_REFUSED


class SettledKind(Enum):
    """What a settlement was told; the module's second table."""

    DONE = "done"
    ACCEPTED = "accepted"
    NOTHING = "nothing"
    STANDS = "stands"


class Settled(NamedTuple):
    """The answer for one recipient; ``matter`` is what stands for STANDS."""

    kind: SettledKind
    matter: Matter | None = None


DONE = Settled(SettledKind.DONE)
SETTLED_ACCEPTED = Settled(SettledKind.ACCEPTED)
SETTLED_NOTHING = Settled(SettledKind.NOTHING)


@dataclass(frozen=True, slots=True)
class Settlements:
    """The answer to a settle: answers parallel to the settlements."""

    seq: int
    now_ms: int
    answers: tuple[Settled, ...]


@dataclass(frozen=True, slots=True)
class Entry:
    """What a ledger holds of one ordinal: the bit, or a matter, or nothing."""

    accepted: bool = False
    matter: Matter | None = None


NOTHING = Entry()
BIT = Entry(accepted=True)

_ENDED = {
    RunStatus.CANCELLED: (Outcome.CANCELLED, Reason.RUN_CANCELLED),
    RunStatus.EXPIRED: (Outcome.EXPIRED, Reason.RUN_EXPIRED),
}


def in_doubt(claim: Claim, now_ms: int) -> Held:
    """The held matter that a claim without a live owner becomes."""
    return Held(
        claim.epoch,
        claim.generation,
        claim.attempt,
        claim.provider,
        now_ms,
        Reason.CLAIM_IN_DOUBT,
    )


def _ownerless(claim: Claim) -> Claim:
    return replace(claim, epoch=NO_EPOCH, doubt=True)


def judge(
    found: Entry,
    ask: Ask,
    owner: Owner,
    status: RunStatus | None,
    opted_out: bool,
    now_ms: int,
) -> tuple[Verdict, Entry]:
    """The claim table: the verdict on one ask, and what is left behind."""
    matter = found.matter
    if found.accepted:
        return ACCEPTED, found
    if isinstance(matter, Closed) and matter.generation >= ask.generation:
        return Verdict(VerdictKind.CLOSED, matter), found
    if isinstance(matter, Held):
        return Verdict(VerdictKind.HELD, matter), found

    own = doubt = False
    if isinstance(matter, Claim):
        if matter.epoch == owner.epoch:
            own = (matter.generation, matter.attempt, matter.provider) == (
                ask.generation,
                ask.attempt,
                ask.provider,
            )
            if not own:
                return Verdict(VerdictKind.WAIT, matter), found
        elif owner.lane is Lane.PROMOTIONAL:
            held = in_doubt(matter, now_ms)
            return Verdict(VerdictKind.HELD, held), Entry(matter=held)
        doubt = not own or matter.doubt

    final: tuple[Outcome, Reason] | None = None
    if status is not RunStatus.RUNNING:
        refusal = NOT_RUNNING
        final = _ENDED.get(status) if status else None
    elif now_ms >= ask.deadline_ms:
        final = (Outcome.EXPIRED, Reason.DEADLINE)
    elif now_ms >= ask.valid_until_ms:
        refusal = STALE
    elif opted_out:
        final = (Outcome.FAILED, Reason.OPTED_OUT)
    else:
        claim = Claim(owner.epoch, ask.generation, ask.attempt, ask.provider, now_ms, doubt)
        return REPEATED if doubt else CLAIMED, found if own else Entry(matter=claim)

    if final is not None:
        if doubt and isinstance(matter, Claim):
            held = in_doubt(matter, now_ms)
            return Verdict(VerdictKind.HELD, held), Entry(matter=held)
        closed = Closed(owner.epoch, ask.generation, ask.attempt, *final, now_ms)
        return Verdict(VerdictKind.CLOSED, closed), Entry(matter=closed)
    if isinstance(matter, Claim):
        return refusal, Entry(matter=_ownerless(matter)) if doubt else NOTHING
    return refusal, found


def settle(found: Entry, asked: Settlement, epoch: int, now_ms: int) -> tuple[Settled, Entry]:
    """The settle table: the answer to one settlement, and what is left behind."""
    action, matter = asked.action, found.matter
    if found.accepted:
        return (DONE if action is Action.ACCEPT else SETTLED_ACCEPTED), found
    if matter is None:
        return (DONE if action is Action.RELEASE else SETTLED_NOTHING), found
    same = (matter.generation, matter.attempt) == (asked.generation, asked.attempt)
    if same and isinstance(matter, Claim) and matter.epoch == epoch:
        return _settle_own(matter, asked, now_ms)
    if same and isinstance(matter, Claim):
        repeat = matter.epoch == NO_EPOCH and action in (Action.RELEASE, Action.DOUBT)
    elif same and isinstance(matter, Held):
        repeat = action is Action.HOLD and matter.epoch == epoch
    elif same and isinstance(matter, Closed):
        repeat = action is Action.CLOSE and (matter.outcome, matter.reason) == (
            asked.outcome,
            asked.reason,
        )
    else:
        repeat = False
    return (DONE if repeat else Settled(SettledKind.STANDS, matter)), found


def _settle_own(claim: Claim, asked: Settlement, now_ms: int) -> tuple[Settled, Entry]:
    match asked.action:
        case Action.ACCEPT:
            return DONE, BIT
        case Action.RELEASE:
            return DONE, Entry(matter=_ownerless(claim)) if claim.doubt else NOTHING
        case Action.DOUBT:
            return DONE, Entry(matter=_ownerless(claim))
        case Action.HOLD:
            held = replace(in_doubt(claim, now_ms), reason=Reason.NO_ANSWER)
            return DONE, Entry(matter=held)
        case Action.CLOSE if claim.doubt:
            held = in_doubt(claim, now_ms)
            return Settled(SettledKind.STANDS, held), Entry(matter=held)
        case Action.CLOSE:
            closed = Closed(
                claim.epoch,
                claim.generation,
                claim.attempt,
                asked.outcome,
                asked.reason,
                now_ms,
            )
            return DONE, Entry(matter=closed)


def reconciled(found: Entry) -> Entry:
    """What a webhook for the message makes of an entry: it was sent."""
    return BIT if isinstance(found.matter, (Claim, Held)) else found


@dataclass(frozen=True, slots=True)
class LedgerView:
    """A ledger, as an operator sees it."""

    dataset: str
    seq: int
    count: int
    accepted: int
    claims: int
    held: int
    closed: int


@dataclass(slots=True)
class _Shard:
    dataset: str
    seq: int
    count: int
    entries: dict[int, Entry] = field(default_factory=dict)

    def at(self, ordinal: int) -> Entry:
        if ordinal >= self.count:
            raise Corrupt(beyond(ordinal, self.count))
        return self.entries.get(ordinal, NOTHING)

    def put(self, ordinal: int, entry: Entry) -> None:
        if entry == NOTHING:
            self.entries.pop(ordinal, None)
        else:
            self.entries[ordinal] = entry


def beyond(ordinal: int, count: int) -> str:
    """The message of the error for an ordinal that a ledger does not have."""
    return f"ordinal {ordinal} is not in the ledger of {count} recipients: wrong snapshot?"


def absent(ref: LedgerRef) -> str:
    """The message of the error for a ledger that is not there."""
    return (
        f"ledger {ref.tenant}/{ref.run}/{ref.leg}/{ref.shard} is absent: restore Redis, or "
        "rebuild it from the outcomes; nothing is sent without it"
    )


def rolled_back(ref: LedgerRef, dataset: str, seq: int, seen: Seen) -> str:
    """The message of the error for a ledger that is older than what was seen of it."""
    return (
        f"ledger {ref.tenant}/{ref.run}/{ref.leg}/{ref.shard} is dataset {dataset} at {seq}, but "
        f"dataset {seen.dataset} at {seen.seq} was seen: Redis lost writes; rebuild the ledger"
    )


def fenced(owner: Owner, current: int) -> str:
    """The message of the error for a writer whose delivery key was taken over, or lost."""
    return (
        f"delivery key {owner.key} of the {owner.lane.value} lane is at epoch {current}, "
        f"not {owner.epoch}: another process owns it"
    )


class LedgerModel:
    """A ledger server in memory: the contract that ``sinks.ledger`` is held to.

    Every method takes the clock as an argument where it reads one. Methods raise as the table of
    calls says; what raised has changed nothing.
    """

    def __init__(self) -> None:
        self.shards: dict[LedgerRef, _Shard] = {}
        self.epochs: dict[tuple[Lane, int], int] = {}
        self.runs: dict[tuple[Tenant, RunId], tuple[int, RunStatus]] = {}
        self.opt_outs: dict[tuple[RecipientKey, str], int] = {}

    def create(
        self, tenant: Tenant, run: RunId, leg: LegId, counts: Sequence[int], dataset: str
    ) -> None:
        """Make the ledgers of a leg; those that exist are left as they are.

        Raises ``Corrupt`` when one exists with another dataset or count.
        """
        for shard, count in enumerate(counts):
            ref = LedgerRef(tenant, run, leg, shard)
            there = self.shards.setdefault(ref, _Shard(dataset, 0, count))
            if (there.dataset, there.count) != (dataset, count):
                raise Corrupt(differs(ref, there.dataset, there.count, dataset, count))

    def drop(self, tenant: Tenant, run: RunId, leg: LegId) -> None:
        """Forget the ledgers of a leg."""
        for shard in range(SHARDS):
            self.shards.pop(LedgerRef(tenant, run, leg, shard), None)

    def acquire_epoch(self, lane: Lane, key: int) -> int:
        """The next epoch of a delivery key: whoever held the last one is fenced from now on."""
        epoch = self.epochs[lane, key] = self.epochs.get((lane, key), 0) + 1
        return epoch

    def publish(self, tenant: Tenant, run: RunId, version: int, status: RunStatus) -> bool:
        """Set the status of a run, unless as new a version is known. Says whether it was set."""
        if self.runs.get((tenant, run), (-1, None))[0] >= version:
            return False
        self.runs[tenant, run] = (version, status)
        return True

    def opt_out(self, recipient: RecipientKey, scope_: str, now_ms: int) -> None:
        """Remember that sends already decided must not leave any more."""
        self.opt_outs[recipient, scope_] = now_ms

    def opt_in(self, recipient: RecipientKey, scope_: str) -> None:
        """Forget an opt-out of exactly this scope."""
        self.opt_outs.pop((recipient, scope_), None)

    def look(self, ref: LedgerRef) -> Seen:
        """How far a ledger is. Raises ``MissingLedger``."""
        shard = self._shard(ref)
        return Seen(shard.dataset, shard.seq)

    def accepted(self, ref: LedgerRef, ordinals: Sequence[int]) -> Set[int]:
        """Which of these recipients have the message: nobody where the ledger is absent."""
        shard = self.shards.get(ref)
        entries = shard.entries if shard is not None else {}
        return {at for at in ordinals if entries.get(at, NOTHING).accepted}

    def view(self, ref: LedgerRef) -> LedgerView:
        """A ledger's counts. Raises ``MissingLedger``."""
        shard = self._shard(ref)
        kinds = [type(entry.matter) for entry in shard.entries.values()]
        return LedgerView(
            shard.dataset,
            shard.seq,
            shard.count,
            sum(entry.accepted for entry in shard.entries.values()),
            kinds.count(Claim),
            kinds.count(Held),
            kinds.count(Closed),
        )

    def list_open(self, ref: LedgerRef) -> Mapping[int, Matter]:
        """The open matters by ordinal. Raises ``MissingLedger``."""
        entries = self._shard(ref).entries
        return {at: entry.matter for at, entry in sorted(entries.items()) if entry.matter}

    def claim(
        self,
        ref: LedgerRef,
        owner: Owner,
        seen: Seen,
        scopes: Sequence[str],
        asks: Sequence[Ask],
        now_ms: int,
    ) -> Claims | Moved:
        """Ask for leave to send, one ask after the other."""
        shard = self._opened(ref, owner, seen, [ask.ordinal for ask in asks])
        if isinstance(shard, Moved):
            return shard
        _, status = self.runs.get((ref.tenant, ref.run), (-1, None))
        verdicts = []
        for ask in asks:
            opted_out = any(
                now_ms - self.opt_outs.get((ask.recipient, each), -OPT_OUT_MEMORY_MS)
                < OPT_OUT_MEMORY_MS
                for each in scopes
            )
            verdict, entry = judge(shard.at(ask.ordinal), ask, owner, status, opted_out, now_ms)
            shard.put(ask.ordinal, entry)
            verdicts.append(verdict)
        shard.seq += 1
        return Claims(shard.seq, now_ms, status, tuple(verdicts))

    def settle(
        self,
        ref: LedgerRef,
        owner: Owner,
        seen: Seen,
        settlements: Sequence[Settlement],
        now_ms: int,
    ) -> Settlements | Moved:
        """Record what became of claimed requests, one after the other."""
        shard = self._opened(ref, owner, seen, [each.ordinal for each in settlements])
        if isinstance(shard, Moved):
            return shard
        answers = []
        for each in settlements:
            answer, entry = settle(shard.at(each.ordinal), each, owner.epoch, now_ms)
            shard.put(each.ordinal, entry)
            answers.append(answer)
        shard.seq += 1
        return Settlements(shard.seq, now_ms, tuple(answers))

    def reconcile(self, ref: LedgerRef, ordinals: Sequence[int]) -> tuple[Entry, ...]:
        """A webhook tells of these messages; answers what stands now."""
        shard = self._shard(ref)
        found = [shard.at(ordinal) for ordinal in ordinals]
        after = tuple(reconciled(entry) for entry in found)
        for ordinal, entry in zip(ordinals, after, strict=True):
            shard.put(ordinal, entry)
        shard.seq += list(after) != found
        return after

    def settle_by_hand(self, ref: LedgerRef, ordinal: int, held: Held, accepted: bool) -> bool:
        """Settle the unknown that a person saw; false when something else stands there now."""
        shard = self._shard(ref)
        if shard.at(ordinal).matter != held:
            return False
        shard.put(ordinal, BIT if accepted else NOTHING)
        shard.seq += 1
        return True

    def _shard(self, ref: LedgerRef) -> _Shard:
        shard = self.shards.get(ref)
        if shard is None:
            raise MissingLedger(absent(ref))
        return shard

    def _opened(
        self, ref: LedgerRef, owner: Owner, seen: Seen, ordinals: Sequence[int]
    ) -> _Shard | Moved:
        own_key(ref, owner)
        shard = self._shard(ref)
        if shard.dataset != seen.dataset or shard.seq < seen.seq:
            raise LedgerRolledBack(rolled_back(ref, shard.dataset, shard.seq, seen))
        epoch = self.epochs.get((owner.lane, owner.key), 0)
        if epoch < owner.epoch:
            raise LedgerRolledBack(fenced(owner, epoch))
        if epoch > owner.epoch:
            raise Fenced(fenced(owner, epoch))
        if shard.seq > seen.seq:
            return Moved(shard.seq)
        for ordinal in ordinals:
            shard.at(ordinal)
        return shard


def own_key(ref: LedgerRef, owner: Owner) -> None:
    """Refuse a writer of another delivery key: a ledger has one. Raises ``ValueError``."""
    if owner.key != delivery_key(ref.shard):
        raise ValueError(
            f"shard {ref.shard} belongs to delivery key {delivery_key(ref.shard)}, "
            f"not {owner.key}: two keys must never write one ledger"
        )


def differs(ref: LedgerRef, dataset: str, count: int, wanted: str, wanted_count: int) -> str:
    """The message of the error for a ledger that exists as another."""
    return (
        f"ledger {ref.tenant}/{ref.run}/{ref.leg}/{ref.shard} exists as dataset {dataset} of "
        f"{count} recipients, not {wanted} of {wanted_count}: drop it, or use another run"
    )
