"""Random histories on the model and on a real Redis at once: every answer must be the same.

Redis's clock is told to the model by each answer, so times are compared exactly. The histories
have several epochs of both lanes, lost answers and late twins, generations that overtake each
other, and every way to settle.
"""

from __future__ import annotations

from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import HealthCheck, settings
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    rule,
    run_state_machine_as_test,
)

from schemas.errors import FanfareError
from schemas.pages import delivery_key
from schemas.reasons import Lane, Outcome, Reason, RunStatus
from tests.ledger.backends import LEG, RUN, TENANT, ModelBackend, RedisBackend, all_shards
from tests.ledger.server import RedisServer
from transforms.ledger import (
    Action,
    Ask,
    Claim,
    Claims,
    Closed,
    Held,
    LedgerRef,
    Matter,
    Moved,
    Owner,
    RecipientKey,
    Seen,
    Settlement,
    Settlements,
    recipient_key,
    scope,
    scopes_of,
)

REF = LedgerRef(TENANT, RUN, LEG, 3)
KEY = delivery_key(3)
COUNT = 12
FAR_MS, PAST_MS = 1 << 45, 1
PEOPLE = [recipient_key(TENANT, name) for name in "ab"]

ordinals = st.integers(0, 3) | st.integers(0, COUNT)
small = st.integers(0, 2)
lanes = st.sampled_from(list(Lane))
times = st.sampled_from([FAR_MS, FAR_MS, FAR_MS, PAST_MS])
scopes_given = st.sampled_from(
    [scope(c, t) for c in ("email", "*", "sms") for t in ("offers", "*")]
)
asks = st.builds(
    Ask,
    ordinal=ordinals,
    generation=small,
    attempt=small,
    provider=st.sampled_from(["sg", "sgx"]),
    recipient=st.sampled_from(PEOPLE),
    valid_until_ms=times,
    deadline_ms=times,
)
settlements = st.builds(
    Settlement,
    ordinal=ordinals,
    generation=small,
    attempt=small,
    action=st.sampled_from(list(Action)),
    outcome=st.sampled_from([Outcome.FAILED, Outcome.EXPIRED]),
    reason=st.sampled_from([Reason.PROVIDER_REFUSED, Reason.ADDRESS_REFUSED]),
)
seqs = st.sampled_from([0, 0, 0, 0, 0, -1, -2, 1])


class Histories(RuleBasedStateMachine):
    redis: RedisBackend

    @initialize()
    def begin(self) -> None:
        self.redis.flush()
        self.model = ModelBackend(now_ms=0)
        self.both("create", all_shards(COUNT), "d1")
        for lane in Lane:
            self.both("acquire_epoch", lane, KEY)
        self.version = 1
        self.both("publish", 1, RunStatus.RUNNING)

    def both(self, name: str, *arguments: object) -> Any:
        """The answer of both, or the kind of error that both raised."""
        theirs = self.outcome(self.redis, name, *arguments)
        if isinstance(theirs, (Claims, Settlements)):
            self.model.now_ms = theirs.now_ms
        ours = self.outcome(self.model, name, *arguments)
        assert theirs == ours, (name, arguments)
        return theirs

    @staticmethod
    def outcome(side: object, name: str, *arguments: object) -> object:
        try:
            return getattr(side, name)(*arguments)
        except FanfareError as error:
            return type(error), str(error)

    def owner(self, lane: Lane, behind: int) -> Owner:
        return Owner(lane, KEY, max(0, self.model.model.epochs[lane, KEY] - behind))

    def seen(self, off: int) -> Seen:
        return Seen("d1", max(0, self.model.look(REF).seq + off))

    @rule(lane=lanes)
    def take_over(self, lane: Lane) -> None:
        self.both("acquire_epoch", lane, KEY)

    @rule(
        lane=lanes,
        behind=st.sampled_from([0, 0, 0, 0, 1, -1]),
        off=seqs,
        batch=st.lists(asks, max_size=5),
    )
    def claim(self, lane: Lane, behind: int, off: int, batch: list[Ask]) -> None:
        scopes = scopes_of("email", "offers")
        self.both("claim", REF, self.owner(lane, behind), self.seen(off), scopes, batch)

    @rule(
        lane=lanes,
        behind=st.sampled_from([0, 0, 0, 0, 1, -1]),
        off=seqs,
        batch=st.lists(settlements, max_size=5),
    )
    def settle(self, lane: Lane, behind: int, off: int, batch: list[Settlement]) -> None:
        self.both("settle", REF, self.owner(lane, behind), self.seen(off), batch)

    @rule(data=st.data(), lane=lanes)
    def go_on_with_what_stands(self, data: st.DataObject, lane: Lane) -> None:
        """Settle, or ask again for, what is really there: random ones seldom hit."""
        matters = self.model.list_open(REF)
        if not matters:
            return
        at = data.draw(st.sampled_from(sorted(matters)))
        matter = matters[at]
        owner, seen = self.owner(lane, 0), self.seen(0)
        if data.draw(st.booleans()) and not isinstance(matter, Closed):
            again = Ask(
                at, matter.generation, matter.attempt, matter.provider, PEOPLE[0],
                data.draw(times), data.draw(times),
            )  # fmt: skip
            scopes = scopes_of("email", "offers")
            self.both("claim", REF, owner, seen, scopes, [again])
        else:
            action = data.draw(st.sampled_from(list(Action)))
            each = Settlement(at, matter.generation, matter.attempt, action)
            self.both("settle", REF, owner, seen, [each])
            twin = self.both("settle", REF, owner, seen, [each])
            assert isinstance(twin, Moved), "a late twin was carried out"
            self.both("settle", REF, owner, self.seen(0), [each])

    @rule(status=st.sampled_from(list(RunStatus)), step=st.integers(-1, 2), run=st.booleans())
    def publish(self, status: RunStatus, step: int, run: bool) -> None:
        self.version = max(0, self.version + step)
        self.both("publish", self.version, RunStatus.RUNNING if run else status)

    @rule(who=st.sampled_from(PEOPLE), what=st.lists(scopes_given, min_size=1, max_size=2))
    def opt_out(self, who: RecipientKey, what: list[str]) -> None:
        self.both("opt_out", REF.shard, who, what)
        for each in what:
            # The moment itself is Redis's; within a history, it is never forgotten.
            self.model.model.opt_outs[who, each] = FAR_MS

    @rule(who=st.sampled_from(PEOPLE), what=st.lists(scopes_given, min_size=1, max_size=2))
    def opt_in(self, who: RecipientKey, what: list[str]) -> None:
        self.both("opt_in", REF.shard, who, what)

    @rule(which=st.lists(ordinals, max_size=3))
    def webhook(self, which: list[int]) -> None:
        self.both("reconcile", REF, which)

    @rule(data=st.data(), accepted=st.booleans(), newer=st.booleans())
    def by_hand(self, data: st.DataObject, accepted: bool, newer: bool) -> None:
        held = {
            at: each for at, each in self.model.list_open(REF).items() if isinstance(each, Held)
        }
        if held:
            at = data.draw(st.sampled_from(sorted(held)))
            seen = held[at]
            if newer:
                seen = Held(
                    seen.epoch, seen.generation + 1, seen.attempt, "sg", seen.at_ms, seen.reason
                )
            self.both("settle_by_hand", REF, at, seen, accepted)

    @rule(count=st.sampled_from([COUNT, COUNT - 1]), dataset=st.sampled_from(["d1", "d2"]))
    def create_again(self, count: int, dataset: str) -> None:
        self.both("create", all_shards(count), dataset)

    @invariant()
    def same_books(self) -> None:
        self.both("view", REF)
        matters: dict[int, Matter] = self.both("list_open", REF)
        accepted: list[int] = self.both("accepted", REF)
        assert not set(accepted) & set(matters), "an ordinal has the bit or a matter, never both"
        assert all(not (isinstance(m, Claim) and not m.epoch) or m.doubt for m in matters.values())


@pytest.mark.parametrize("examples", [60])
def test_redis_answers_as_the_model(shared_redis: RedisServer, examples: int) -> None:
    backend = RedisBackend(shared_redis.url)
    try:
        run_state_machine_as_test(
            type("RedisHistories", (Histories,), {"redis": backend}),
            settings=settings(
                max_examples=examples,
                stateful_step_count=40,
                deadline=None,
                suppress_health_check=list(HealthCheck),
            ),
        )
    finally:
        backend.close()
