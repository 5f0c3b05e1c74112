"""The table of states: its shape, and every world of two hosts that it can lead to."""

from __future__ import annotations

import itertools
import re
from pathlib import Path

import pytest

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
from tests.unit.states_explorer import Found, explore

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
    """PROTECT starts nothing: it protects what runs. In SWITCHING the VM is here, and stands still."""
    for (state, event), new in TABLE.items():
        if new in RUNS and state not in RUNS | {S.SWITCHING}:
            assert event in RIGHTS | {E.PROTECT}, f"{state} --{event}--> {new}"


def test_a_host_whose_backup_may_have_a_checkpoint_goes_on_alone_only_when_it_has_won() -> None:
    """From the first checkpoint on the backup may take over: it must know before that it may not."""
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


# Where it leads

# A session that ends on the primary may leave a backup behind that knows nothing of it and has a checkpoint.
HASTY = {
    "a capture that fails": {(S.PROTECTED, E.CAPTURE_FAILED): S.UNPROTECTED},
    "a refusal": {(S.PROTECTED, E.REFUSED): S.UNPROTECTED},
    "an end that never arrives": {(S.PROTECTED, E.UNPROTECT): S.IDLE},
    "a first acknowledgement that never arrives": {(S.SYNCING, E.LINK_LOST): S.UNPROTECTED},
    "a switch that fails": {(S.SWITCHING, E.CAPTURE_FAILED): S.UNPROTECTED},
    "a backup that does not ask": {(S.STANDBY, E.LINK_LOST): S.ACTIVE},
    "a stale primary that goes on": {(S.HOLDING, E.LOST): S.UNPROTECTED},
}


# In the table for completeness: a service that hears such a thing in such a state has gone on from it before.
SPARE = {(S.PREPARING, E.DROPPED), (S.SUSPECT, E.DROPPED), (S.STANDBY, E.ORDERED)}


@pytest.fixture(scope="module")
def worlds() -> dict[str, Found]:
    return {"file": explore(TABLE, automatic=True), "manual": explore(TABLE, automatic=False)}


@pytest.mark.parametrize("arbiter", ["file", "manual"])
def test_in_no_world_are_two_guests_heard_but_by_an_operators_force(
    worlds: dict[str, Found], arbiter: str
) -> None:
    found = worlds[arbiter]
    assert found.wrong is None, "\n".join(found.wrong or ())
    assert found.worlds > 1000, "and there are many"


def test_the_worlds_use_the_whole_table(worlds: dict[str, Found]) -> None:
    used = worlds["file"].transitions | worlds["manual"].transitions
    assert set(TABLE) - used == SPARE
    assert {TABLE[transition] for transition in used} == set(State)


@pytest.mark.parametrize("mistake", HASTY.values(), ids=HASTY)
def test_a_hasty_table_is_found_out(mistake: dict[tuple[State, Event], State]) -> None:
    found = explore({**TABLE, **mistake}, automatic=True)
    assert found.wrong is not None
