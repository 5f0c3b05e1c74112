"""What one host knows and may do about one VM: the table of states, and nothing else.

Invariant (I3, one runner): a host enters a state of `RUNS` from one in which it did not run the VM only
through WON (the arbiter raised the generation for us), ORDERED (an operator's word) or HANDED_OVER (the
primary gave the VM up, in a planned switch or because its QEMU is gone). Silence, a broken link, and an
arbiter that does not answer give nobody the right to run.

The rules:
  - every (state, event) that is not in TABLE is a bug or a stale event: `after` raises;
  - a primary keeps its VM running in every state but SWITCHING (stopped for the last checkpoint), HOLDING
    after a handover that was not answered, FENCED and ENDED (I5);
  - a primary whose backup may have a checkpoint goes on without it only after WON: from HOLDING, however the
    session ended; the packets of the guest wait until then;
  - a backup's replica is worth a failover exactly in REPLICA_VALID (I1 keeps it whole there).

`python -m curling_fd.failover.states` prints the diagram of docs/protocol.md.
"""

from __future__ import annotations

from enum import StrEnum


class State(StrEnum):
    IDLE = "idle"
    # the primary's
    CONNECTING = "connecting"
    SYNCING = "syncing"
    PROTECTED = "protected"
    HOLDING = "holding"
    UNPROTECTED = "unprotected"
    SWITCHING = "switching"
    FENCED = "fenced"
    ENDED = "ended"
    # the backup's
    PREPARING = "preparing"
    FILLING = "filling"
    STANDBY = "standby"
    SUSPECT = "suspect"
    TAKING_OVER = "taking-over"
    ACTIVE = "active"


class Event(StrEnum):
    PROTECT = "protect"  # protection asked for, or tried again
    UNPROTECT = "unprotect"
    REFUSED = "refused"  # a precheck, QEMU or the peer said no
    PREPARED = "prepared"  # the standby waits
    COMMITTED = "committed"  # the first checkpoint of a session is safe
    LINK_LOST = "link-lost"  # broken, silent past the failure timeout, or spoilt
    CAPTURE_FAILED = "capture-failed"  # no checkpoints to be had; backup and link may be well
    WON = "won"  # the arbiter raised the generation for us
    LOST = "lost"  # the arbiter raised it for somebody else
    STALE = "stale"  # the peer showed a higher generation
    ORDERED = "ordered"  # failover on an operator's word
    SWITCH = "switch"
    HANDED_OVER = "handed-over"
    TAKEN = "taken"  # the peer runs the VM now
    NOT_TAKEN = "not-taken"  # the peer could not: the VM stays here
    RUNNING = "running"  # the standby runs
    STANDBY_DIED = "standby-died"
    GUEST_ENDED = "guest-ended"  # powered off, panicked, or ended by its administrator
    OFFERED = "offered"  # a primary wants us as its backup
    DROPPED = "dropped"  # the primary says the replica is not needed any more


S, E = State, Event

TABLE: dict[tuple[State, Event], State] = {
    (S.IDLE, E.PROTECT): S.CONNECTING,
    (S.UNPROTECTED, E.PROTECT): S.CONNECTING,
    (S.ACTIVE, E.PROTECT): S.CONNECTING,
    (S.ENDED, E.PROTECT): S.CONNECTING,
    (S.FENCED, E.PROTECT): S.CONNECTING,
    (S.CONNECTING, E.PREPARED): S.SYNCING,
    (S.CONNECTING, E.REFUSED): S.UNPROTECTED,
    (S.CONNECTING, E.LINK_LOST): S.UNPROTECTED,
    (S.CONNECTING, E.STALE): S.FENCED,
    (S.CONNECTING, E.GUEST_ENDED): S.ENDED,
    (S.SYNCING, E.COMMITTED): S.PROTECTED,
    (S.SYNCING, E.REFUSED): S.HOLDING,
    (S.SYNCING, E.LINK_LOST): S.HOLDING,
    (S.SYNCING, E.CAPTURE_FAILED): S.HOLDING,
    (S.SYNCING, E.STALE): S.FENCED,
    (S.SYNCING, E.GUEST_ENDED): S.ENDED,
    (S.PROTECTED, E.SWITCH): S.SWITCHING,
    (S.PROTECTED, E.REFUSED): S.HOLDING,
    (S.PROTECTED, E.LINK_LOST): S.HOLDING,
    (S.PROTECTED, E.CAPTURE_FAILED): S.HOLDING,
    (S.PROTECTED, E.STALE): S.FENCED,
    (S.PROTECTED, E.GUEST_ENDED): S.ENDED,
    (S.HOLDING, E.WON): S.UNPROTECTED,
    (S.HOLDING, E.LOST): S.FENCED,
    (S.HOLDING, E.STALE): S.FENCED,
    (S.HOLDING, E.GUEST_ENDED): S.ENDED,
    (S.SWITCHING, E.TAKEN): S.IDLE,
    (S.SWITCHING, E.NOT_TAKEN): S.UNPROTECTED,
    (S.SWITCHING, E.LINK_LOST): S.HOLDING,
    (S.SWITCHING, E.CAPTURE_FAILED): S.HOLDING,
    (S.SWITCHING, E.REFUSED): S.HOLDING,
    (S.SWITCHING, E.STALE): S.FENCED,
    (S.SWITCHING, E.GUEST_ENDED): S.ENDED,
    (S.SWITCHING, E.UNPROTECT): S.HOLDING,
    (S.CONNECTING, E.UNPROTECT): S.IDLE,
    (S.SYNCING, E.UNPROTECT): S.HOLDING,
    (S.PROTECTED, E.UNPROTECT): S.HOLDING,
    (S.UNPROTECTED, E.UNPROTECT): S.IDLE,
    (S.ENDED, E.UNPROTECT): S.IDLE,
    (S.HOLDING, E.UNPROTECT): S.IDLE,
    (S.UNPROTECTED, E.GUEST_ENDED): S.ENDED,
    (S.UNPROTECTED, E.STALE): S.FENCED,
    (S.ACTIVE, E.GUEST_ENDED): S.ENDED,
    (S.ACTIVE, E.STALE): S.FENCED,
    (S.IDLE, E.OFFERED): S.PREPARING,
    (S.ENDED, E.OFFERED): S.PREPARING,
    (S.FENCED, E.OFFERED): S.PREPARING,
    (S.SUSPECT, E.OFFERED): S.PREPARING,
    (S.PREPARING, E.PREPARED): S.FILLING,
    (S.PREPARING, E.REFUSED): S.IDLE,
    (S.PREPARING, E.LINK_LOST): S.IDLE,
    (S.PREPARING, E.DROPPED): S.IDLE,
    (S.FILLING, E.COMMITTED): S.STANDBY,
    (S.FILLING, E.LINK_LOST): S.IDLE,
    (S.FILLING, E.DROPPED): S.IDLE,
    (S.FILLING, E.STANDBY_DIED): S.IDLE,
    (S.STANDBY, E.LINK_LOST): S.SUSPECT,
    (S.STANDBY, E.DROPPED): S.IDLE,
    (S.STANDBY, E.STANDBY_DIED): S.IDLE,
    (S.STANDBY, E.HANDED_OVER): S.TAKING_OVER,
    (S.STANDBY, E.ORDERED): S.TAKING_OVER,
    (S.SUSPECT, E.WON): S.TAKING_OVER,
    (S.SUSPECT, E.ORDERED): S.TAKING_OVER,
    (S.SUSPECT, E.LOST): S.IDLE,
    (S.SUSPECT, E.STANDBY_DIED): S.IDLE,
    (S.SUSPECT, E.DROPPED): S.IDLE,
    (S.TAKING_OVER, E.RUNNING): S.ACTIVE,
    (S.TAKING_OVER, E.STANDBY_DIED): S.IDLE,
}

#: The VM runs on this host, or may.
RUNS = frozenset({S.CONNECTING, S.SYNCING, S.PROTECTED, S.HOLDING, S.UNPROTECTED, S.TAKING_OVER, S.ACTIVE})

#: The replica is a committed checkpoint and a failover from it is allowed once the right is won.
REPLICA_VALID = frozenset({S.STANDBY, S.SUSPECT, S.TAKING_OVER})

PRIMARY = frozenset(
    {
        S.CONNECTING,
        S.SYNCING,
        S.PROTECTED,
        S.HOLDING,
        S.UNPROTECTED,
        S.SWITCHING,
        S.FENCED,
        S.ENDED,
        S.ACTIVE,
    }
)

BACKUP = frozenset({S.PREPARING, S.FILLING, S.STANDBY, S.SUSPECT, S.TAKING_OVER})

#: The only events that give a host the right to run a VM it did not run.
RIGHTS = frozenset({E.WON, E.ORDERED, E.HANDED_OVER})


def role(state: State) -> str:
    """`primary`, `backup` or `none`: how this host stands to the VM in `state`."""
    return "primary" if state in PRIMARY else "backup" if state in BACKUP else "none"


def allowed(state: State, event: Event) -> bool:
    return (state, event) in TABLE


def after(state: State, event: Event) -> State:
    """The state that follows `state` on `event`.

    Raises:
        ValueError: the table has no such transition.
    """
    try:
        return TABLE[state, event]
    except KeyError:
        raise ValueError(f"nothing follows {event} in state {state}") from None


def diagram() -> str:
    """The table as a Mermaid state diagram."""
    lines = ["stateDiagram-v2", "    [*] --> idle"]
    for (state, event), new in TABLE.items():
        lines.append(f"    {_name(state)} --> {_name(new)}: {event}")
    return "\n".join(lines)


def _name(state: State) -> str:
    return state.value.replace("-", "_")


if __name__ == "__main__":
    print(diagram())
