"""The table of states: its shape, and a world of two hosts, a network and an arbiter that is driven by it."""

from __future__ import annotations

import itertools
import re
from pathlib import Path

import pytest
from attrs import define, field
from hypothesis import HealthCheck, assume, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from curling_fd.failover.states import (
    BACKUP,
    PRIMARY,
    REPLICA_VALID,
    RIGHTS,
    RUNS,
    TABLE,
    Event,
    State,
    after,
    allowed,
    diagram,
    role,
)

S, E = State, Event
DOCUMENT = Path(__file__).parents[2] / "docs" / "protocol.md"


def reached_from(start: State) -> set[State]:
    reached, fresh = {start}, {start}
    while fresh:
        fresh = {new for (state, _), new in TABLE.items() if state in fresh} - reached
        reached |= fresh
    return reached


# The shape of the table


def test_every_state_is_reached_from_idle_and_leads_back_to_it() -> None:
    assert reached_from(S.IDLE) == set(State)
    for state in State:
        assert S.IDLE in reached_from(state), state


def test_every_event_means_something_somewhere() -> None:
    assert {event for _, event in TABLE} == set(Event)


def test_only_a_right_leads_into_taking_over_and_only_a_running_standby_out_of_it() -> None:
    assert {event for (_, event), new in TABLE.items() if new is S.TAKING_OVER} == RIGHTS
    assert {(state, event) for (state, event), new in TABLE.items() if new is S.ACTIVE} == {
        (S.TAKING_OVER, E.RUNNING)
    }


def test_a_takeover_starts_from_a_committed_checkpoint() -> None:
    assert {state for (state, _), new in TABLE.items() if new is S.TAKING_OVER} <= REPLICA_VALID


def test_a_host_that_did_not_run_the_vm_starts_to_only_by_a_right() -> None:
    """PROTECT starts nothing: it begins to protect what runs. In SWITCHING the VM is here, and stands still."""
    for (state, event), new in TABLE.items():
        if new in RUNS and state not in RUNS | {S.SWITCHING}:
            assert event in RIGHTS | {E.PROTECT}, f"{state} --{event}--> {new}"


def test_a_host_whose_backup_may_have_a_checkpoint_goes_on_alone_only_when_it_has_won() -> None:
    """From the first checkpoint on the backup may take over: the loser must be known before output flows."""
    for (state, event), new in TABLE.items():
        if state in (S.SYNCING, S.PROTECTED, S.HOLDING) and new not in (S.PROTECTED, S.SWITCHING, S.HOLDING):
            by_right = event in (E.WON, E.LOST, E.STALE, E.GUEST_ENDED)
            by_an_operator = (state, event) == (S.HOLDING, E.UNPROTECT)
            assert by_right or by_an_operator, f"{state} --{event}--> {new}"


def test_losing_the_peer_gives_nobody_a_right() -> None:
    for (state, event), new in TABLE.items():
        if event in (E.LINK_LOST, E.CAPTURE_FAILED, E.REFUSED, E.STANDBY_DIED):
            assert new is not S.ACTIVE
            assert new is not S.TAKING_OVER
            assert state in RUNS | {S.SWITCHING} or new not in RUNS


@pytest.mark.parametrize("state", [S.FENCED, S.ENDED, S.IDLE, *BACKUP - {S.TAKING_OVER}])
def test_a_stale_or_lost_primary_stays_stopped_until_somebody_asks(state: State) -> None:
    for event in Event:
        if allowed(state, event) and after(state, event) in RUNS:
            assert event in RIGHTS | {E.PROTECT}


def test_a_newer_generation_fences_wherever_the_vm_runs() -> None:
    for state in RUNS - {S.TAKING_OVER}:
        assert after(state, E.STALE) is S.FENCED, state


def test_each_state_has_one_role() -> None:
    assert not PRIMARY & BACKUP
    assert set(State) - PRIMARY - BACKUP == {S.IDLE}
    assert {role(state) for state in PRIMARY} == {"primary"}
    assert {role(state) for state in BACKUP} == {"backup"}
    assert role(S.IDLE) == "none"


def test_what_is_not_in_the_table_is_refused() -> None:
    for state, event in itertools.product(State, Event):
        if (state, event) in TABLE:
            assert allowed(state, event)
            assert after(state, event) is TABLE[state, event]
        else:
            assert not allowed(state, event)
            with pytest.raises(ValueError, match=f"{event} in state {state}"):
                after(state, event)


def test_the_diagram_has_an_arrow_for_each_transition() -> None:
    lines = diagram().splitlines()
    assert lines[:2] == ["stateDiagram-v2", "    [*] --> idle"]
    arrows = [re.fullmatch(r" +(\w+) --> (\w+): ([\w-]+)", line) for line in lines[2:]]
    found = {(S(m[1].replace("_", "-")), E(m[3])): S(m[2].replace("_", "-")) for m in arrows if m}
    assert found == TABLE
    assert len(arrows) == len(TABLE)


def test_the_diagram_in_the_documents_is_the_tables() -> None:
    drawn = re.findall(r"```mermaid\n(stateDiagram-v2\n.*?)\n```", DOCUMENT.read_text("utf-8"), re.DOTALL)
    assert diagram() in drawn, "python -m curling_fd.failover.states prints the one to put there"


# A world


@define
class Host:
    """What a host knows, and what is true of the guest on it.

    Attributes:
        generation: the highest it knows of.
        guest: `running`, `stopped`, or None when there is none.
        holds: packets of the guest wait for a commit.
    """

    name: str
    state: State = S.IDLE
    generation: int = 0
    guest: str | None = None
    holds: bool = False

    def on(self, event: Event) -> None:
        self.state = after(self.state, event)

    @property
    def heard(self) -> bool:
        """What the guest sends reaches clients."""
        return self.guest == "running" and not self.holds


@define
class Session:
    """A link between two hosts. What is sent while the network is cut never arrives.

    Attributes:
        ends: the hosts that have not noticed yet that it broke.
        shipped: a whole checkpoint has left the primary.
        acknowledged: the acknowledgement of the first is on its way.
        handover, taken, end: so is that message.
    """

    primary: Host
    backup: Host
    ends: set[str] = field(factory=set)
    shipped: bool = False
    acknowledged: bool = False
    handover: bool = False
    taken: bool = False
    end: bool = False

    @property
    def whole(self) -> bool:
        return len(self.ends) == 2


class World(RuleBasedStateMachine):
    """Two hosts that follow the table and these rules, whatever fails when.

    The rights rule: who wants to run the VM, or to go on without its backup, swaps the generation first.
    """

    #: Whether the arbiter can say no; with `manual` only operators decide who takes over.
    automatic = True

    def __init__(self) -> None:
        super().__init__()
        self.hosts = {"alpha": Host("alpha", guest="running"), "beta": Host("beta")}
        self.session: Session | None = None
        self.connected = True
        self.arbiter_answers = True
        self.highest = 0
        self.holder = ""
        self.forced = False  # an operator has overruled what keeps the hosts apart

    # Helpers

    def other(self, host: Host) -> Host:
        return next(other for other in self.hosts.values() if other is not host)

    def swap(self, host: Host, current: int, *, incumbent: bool = False) -> bool | None:
        """The right to run after `current`: True won, False lost, None no answer."""
        if not self.automatic:
            return True if incumbent else None
        if not self.arbiter_answers:
            return None
        if self.highest > current and (self.highest, self.holder) != (current + 1, host.name):
            return False
        self.highest, self.holder = current + 1, host.name
        host.generation = current + 1
        return True

    def leave(self, host: Host) -> None:
        """`host` closes its end of the link."""
        if self.session is not None:
            self.session.ends.discard(host.name)
            if not self.session.ends:
                self.session = None

    def part_of(self, host: Host, *, primary: bool) -> Session | None:
        session = self.session
        if session is None or host.name not in session.ends:
            return None
        return session if (session.primary is host) is primary else None

    def fence(self, host: Host, event: Event) -> None:
        host.on(event)
        host.guest = "stopped" if host.guest else None
        self.leave(host)

    def drop(self, host: Host, event: Event) -> None:
        """A backup gives its replica up."""
        host.on(event)
        self.leave(host)

    def go_alone(self, host: Host) -> None:
        """A primary in HOLDING asks for the right to go on without its backup."""
        won = self.swap(host, host.generation, incumbent=True)
        if won:
            host.on(E.WON)
            host.guest, host.holds = "running", False
        elif won is False:
            self.fence(host, E.LOST)

    # The network, the arbiter

    @rule()
    def cut_or_heal(self) -> None:
        self.connected = not self.connected
        if not self.connected and self.session is not None:
            session = self.session  # what was on its way is lost
            session.acknowledged = session.handover = session.taken = session.end = False

    @rule()
    def arbiter_fails_or_comes_back(self) -> None:
        self.arbiter_answers = not self.arbiter_answers

    # The primary

    hosts_drawn = st.sampled_from(["alpha", "beta"])

    @rule(name=hosts_drawn)
    def an_operator_or_the_retry_protects(self, name: str) -> None:
        host = self.hosts[name]
        assume(host.guest == "running" and allowed(host.state, E.PROTECT))
        host.on(E.PROTECT)

    @rule(name=hosts_drawn)
    def a_primary_connects(self, name: str) -> None:
        host, peer = self.hosts[name], self.other(self.hosts[name])
        assume(host.state is S.CONNECTING)
        if not self.connected:
            host.on(E.LINK_LOST)
            return
        running_there = peer.state in RUNS or peer.state is S.SWITCHING
        if running_there and host.generation < peer.generation:
            host.generation = peer.generation
            self.fence(host, E.STALE)
            return
        if running_there and host.generation == peer.generation:
            host.on(E.REFUSED)
            return
        if running_there and allowed(peer.state, E.STALE):
            peer.generation = host.generation
            self.fence(peer, E.STALE)
        if peer.state is S.FENCED:
            peer.guest = None
        if self.session is not None:  # the peer lets go of an earlier link
            self.leave(host)
            if self.session is not None:
                self.notices_the_loss(peer.name)
        if not allowed(peer.state, E.OFFERED):
            host.on(E.REFUSED)
            return
        peer.on(E.OFFERED)
        current = max(peer.generation, host.generation)
        if self.automatic and (not self.arbiter_answers or not self.claims(host, current)):
            host.on(E.REFUSED if not self.arbiter_answers else E.STALE)
            host.guest = "stopped" if host.state is S.FENCED else host.guest
            peer.on(E.LINK_LOST)
            return
        host.generation = peer.generation = max(current, host.generation)
        peer.on(E.PREPARED)
        host.on(E.PREPARED)
        self.session = Session(host, peer, {"alpha", "beta"})

    def claims(self, host: Host, current: int) -> bool:
        """Bring the primary's generation up to what peer and arbiter know."""
        if max(self.highest, current) > host.generation or not self.highest:
            return bool(self.swap(host, max(self.highest, current), incumbent=True))
        return True

    @precondition(lambda self: self.session is not None)
    @rule()
    def the_first_checkpoint_is_shipped(self) -> None:
        session = self.session
        assert session is not None
        assume(session.primary.state is S.SYNCING and session.whole)
        session.shipped = session.primary.holds = True

    @precondition(lambda self: self.session is not None)
    @rule()
    def the_first_checkpoint_is_committed(self) -> None:
        session = self.session
        assert session is not None
        assume(session.shipped and session.backup.state is S.FILLING and session.whole and self.connected)
        session.backup.on(E.COMMITTED)
        session.acknowledged = True

    @precondition(lambda self: self.session is not None)
    @rule()
    def its_acknowledgement_arrives(self) -> None:
        session = self.session
        assert session is not None
        assume(session.acknowledged and session.primary.state is S.SYNCING and session.whole)
        session.primary.on(E.COMMITTED)
        session.acknowledged = False

    @rule(name=hosts_drawn)
    def notices_the_loss(self, name: str) -> None:
        """Silence, or the end of the connection; also of one that only this side took for broken."""
        host, session = self.hosts[name], self.session
        assume(session is not None and name in session.ends and allowed(host.state, E.LINK_LOST))
        self.leave(host)
        host.on(E.LINK_LOST)
        if host.state is S.HOLDING:
            self.go_alone(host)

    @rule(name=hosts_drawn, event=st.sampled_from([E.CAPTURE_FAILED, E.REFUSED]))
    def a_session_fails_on_the_primary(self, name: str, event: Event) -> None:
        host = self.hosts[name]
        assume(self.part_of(host, primary=True) and allowed(host.state, event))
        host.on(event)
        self.leave(host)
        if host.state is S.HOLDING:
            self.go_alone(host)

    @rule(name=hosts_drawn)
    def asks_the_arbiter_again(self, name: str) -> None:
        host = self.hosts[name]
        # With `manual` a guest that was handed over goes on only when the backup says that it has not got it.
        assume(host.state is S.HOLDING and (self.automatic or host.guest == "running"))
        self.go_alone(host)

    @rule(name=hosts_drawn)
    def asks_the_peer_whether_it_took_the_vm(self, name: str) -> None:
        host, peer = self.hosts[name], self.other(self.hosts[name])
        assume(host.state is S.HOLDING and host.guest == "stopped" and not self.automatic and self.connected)
        if self.session is not None:
            self.notices_the_loss(peer.name)
        if peer.generation > host.generation:
            host.generation = peer.generation
            self.fence(host, E.LOST)
        else:
            if allowed(peer.state, E.OFFERED):  # the greeting is one
                peer.on(E.OFFERED)
                peer.on(E.LINK_LOST)
            self.go_alone(host)

    @rule(name=hosts_drawn)
    def the_guest_ends(self, name: str) -> None:
        host = self.hosts[name]
        assume(host.guest == "running" and allowed(host.state, E.GUEST_ENDED))
        session = self.part_of(host, primary=True)
        host.on(E.GUEST_ENDED)
        host.guest = None
        self.say_end(host, session)

    @rule(name=hosts_drawn)
    def an_operator_unprotects(self, name: str) -> None:
        host = self.hosts[name]
        assume(host.guest == "running" and allowed(host.state, E.UNPROTECT))
        session = self.part_of(host, primary=True)
        # In doubt about the backup, an operator may say that the guest goes on.
        self.forced |= host.state is S.HOLDING
        host.on(E.UNPROTECT)
        self.say_end(host, session)
        if host.state is S.HOLDING:
            self.go_alone(host)
        else:
            host.holds = False

    def say_end(self, host: Host, session: Session | None) -> None:
        if session is not None:
            session.end = self.connected
        self.leave(host)

    @precondition(lambda self: self.session is not None and self.session.end)
    @rule()
    def the_end_arrives(self) -> None:
        assert self.session is not None
        backup = self.session.backup
        assume(allowed(backup.state, E.DROPPED))
        self.drop(backup, E.DROPPED)

    # A planned move

    @rule(name=hosts_drawn)
    def an_operator_switches(self, name: str) -> None:
        host = self.hosts[name]
        session = self.part_of(host, primary=True)
        assume(session is not None and session.whole and allowed(host.state, E.SWITCH))
        assert session is not None
        host.on(E.SWITCH)
        host.guest = "stopped"  # after the last checkpoint, which is committed
        session.handover = self.connected

    @precondition(lambda self: self.session is not None and self.session.handover)
    @rule()
    def the_handover_arrives(self) -> None:
        session = self.session
        assert session is not None
        backup = session.backup
        assume(backup.name in session.ends and backup.state is S.STANDBY)
        session.handover = False
        if self.automatic and not self.swap(backup, backup.generation):
            self.drop(backup, E.DROPPED)
            return
        if not self.automatic:
            backup.generation += 1
        backup.on(E.HANDED_OVER)
        session.taken = self.connected

    @precondition(lambda self: self.session is not None and self.session.taken)
    @rule()
    def the_primary_hears_that_it_was_taken(self) -> None:
        session = self.session
        assert session is not None
        primary = session.primary
        assume(primary.state is S.SWITCHING and session.backup.state is S.ACTIVE)
        primary.on(E.TAKEN)
        primary.generation, primary.guest, primary.holds = session.backup.generation, None, False
        self.session = None

    # The backup

    @rule(name=hosts_drawn)
    def a_suspicious_backup_asks_the_arbiter(self, name: str) -> None:
        host = self.hosts[name]
        assume(host.state is S.SUSPECT and not self.connected and self.automatic)
        won = self.swap(host, host.generation)
        if won:
            host.on(E.WON)
        elif won is False:
            self.drop(host, E.LOST)

    @rule(name=hosts_drawn)
    def the_standby_runs(self, name: str) -> None:
        host = self.hosts[name]
        assume(host.state is S.TAKING_OVER)
        host.on(E.RUNNING)
        host.guest, host.holds = "running", False
        if self.part_of(host, primary=False):
            self.leave(host) if not (self.session and self.session.taken) else None

    @rule(name=hosts_drawn)
    def the_standby_dies(self, name: str) -> None:
        host = self.hosts[name]
        assume(allowed(host.state, E.STANDBY_DIED))
        self.drop(host, E.STANDBY_DIED)

    @rule(name=hosts_drawn, knows_better=st.booleans())
    def an_operator_orders_a_failover(self, name: str, knows_better: bool) -> None:
        host = self.hosts[name]
        assume(host.state in REPLICA_VALID and allowed(host.state, E.ORDERED))
        linked = host.state is S.STANDBY
        assume(knows_better or not linked)
        if self.automatic:
            if not self.swap(host, host.generation):
                return
        else:
            self.forced = True  # nothing but the operator's word keeps the other from running it
            host.generation += 1
        session = self.part_of(host, primary=False)
        if session is not None and session.whole and self.connected:
            primary = session.primary
            primary.generation = host.generation
            self.fence(primary, E.STALE)
        self.leave(host)
        if linked:
            host.on(E.LINK_LOST)
        host.on(E.ORDERED)

    # What must hold

    @invariant()
    def one_runner(self) -> None:
        assert self.forced or sum(host.heard for host in self.hosts.values()) <= 1, "two guests are heard"

    @invariant()
    def no_two_run_by_the_same_right(self) -> None:
        one, two = self.hosts.values()
        if self.forced or not {one.state, two.state} <= RUNS:
            return
        assert one.generation != two.generation
        older = min(one, two, key=lambda host: host.generation)
        assert not older.heard, "the one whose right is older is silent"

    @invariant()
    def a_guest_runs_where_the_state_says_so(self) -> None:
        for host in self.hosts.values():
            if host.guest == "running":
                assert host.state in RUNS | {S.IDLE}, host
            if host.state in (S.FENCED, S.ENDED, *BACKUP):
                assert host.guest != "running", host

    @invariant()
    def the_guest_is_held_only_while_it_is_not_known_who_may_run_it(self) -> None:
        for host in self.hosts.values():
            if host.holds and host.guest == "running":
                assert host.state in (S.SYNCING, S.PROTECTED, S.HOLDING), host


class ManualWorld(World):
    automatic = False


thorough = settings(
    max_examples=150,
    stateful_step_count=40,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.filter_too_much, HealthCheck.too_slow],
)


@pytest.mark.parametrize("world", [World, ManualWorld])
def test_never_are_two_guests_heard_but_by_an_operators_force(world: type[World]) -> None:
    run_state_machine_as_test(world, settings=thorough)
