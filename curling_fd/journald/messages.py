"""What an operator acts on, each kind of it with a fixed id, and the fields of a VM's entries.

An entry with a MESSAGE_ID has an explanation in systemd/curling.catalog, which `journalctl -x` shows. The ids
are random and for ever: scripts of administrators wait for them. A kind that is not told any more keeps its
id unused. Source: https://systemd.io/CATALOG/.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from enum import Enum

from attrs import frozen

from curling_fd.failover.states import Event, State

#: SYSLOG_IDENTIFIER of everything the daemon says: what `journalctl -t` takes.
IDENTIFIER = "curlingd"


class Message(Enum):
    """Kinds of entries; a value is a MESSAGE_ID."""

    PROTECTED = "76e90182100048349d030c53846a680f"
    REPLICA_READY = "19035b3340734a739b1170de5842c760"
    PROTECTION_LOST = "f93a1de64afa414f992d76b41766dc2e"
    RUNS_ALONE = "90a802ec594143018bc9d8b0ea35a1da"
    NOT_PROTECTED = "d4e31e597379407b97aa79d3bd180344"
    UNPROTECTED = "32cac6260fc94828983f3f6a8e924235"
    ARBITER_SILENT = "829460d1b08947f38e8b4b0b53691f37"
    SUSPECT = "92a77dcd1adb4b7e9c86fdfca60efd86"
    WAITING = "4510ba380ea24ea0b485d19b15f9f6a6"
    TAKING_OVER = "567b343769a74e90aaa27a6ccded3f0e"
    TAKEN_OVER = "e9d06d1a606346a7b7220d68fc54face"
    SWITCHED = "9638c498bd4a4800bed6eb645f6fe0c2"
    NOT_SWITCHED = "128c88ecc5784f8baba6bde0c0439160"
    SWITCH_IN_DOUBT = "beed8571a94745a3a4a14362c6e6e479"
    FENCED = "ecc0645980c94b21b5cfc5d705e7ca0c"
    STOPPED = "1e3dc421a1c14d66b5e340da8a182bd2"
    STOP_FAILED = "11ed6265188f45ce9f2c846a0ed639d5"
    GUEST_ENDED = "725d6d055c114dd380cec52a2fc3b677"
    STANDBY_DIED = "e0683997aba54b52b7cc09f4a5e0d051"
    REPLICA_DROPPED = "31c7684b6b0144ef8c01a74afb2f0b4b"
    OFFER_REFUSED = "b1bd035b74b34450a269a35bf3a72878"
    NOT_REMEMBERED = "189f707979544a3cba4b33a8aa35e241"
    CANNOT_START = "bcc2116c61c74246ab5685d328331c54"
    TAKEN_UP = "b579561b8c9a47ba8cc826e4f8a6ac72"
    LIMIT_RAISED = "4f121d29bf5a444fa1e9bf8222d4d958"
    OUTPUT_STUCK = "858a22cffbc34d4e99fbf6392b7277de"
    NETWORK = "9c54f64016284b5ea773733d429de715"


S, E, M = State, Event, Message

#: Event, the state before and after it (None: any, or none is told), and what that is to an operator. The
#: first that fits counts; what fits none has no id.
_RULES: tuple[tuple[str, State | None, State | None, Message], ...] = (
    (E.COMMITTED, None, S.PROTECTED, M.PROTECTED),
    (E.COMMITTED, None, S.STANDBY, M.REPLICA_READY),
    (E.LINK_LOST, S.SWITCHING, S.HOLDING, M.SWITCH_IN_DOUBT),
    (E.REFUSED, S.SWITCHING, S.HOLDING, M.SWITCH_IN_DOUBT),
    (E.LINK_LOST, None, S.HOLDING, M.PROTECTION_LOST),
    (E.CAPTURE_FAILED, None, S.HOLDING, M.PROTECTION_LOST),
    (E.REFUSED, None, S.HOLDING, M.PROTECTION_LOST),
    (E.WON, None, S.UNPROTECTED, M.RUNS_ALONE),
    (E.REFUSED, None, S.UNPROTECTED, M.NOT_PROTECTED),
    (E.LINK_LOST, None, S.UNPROTECTED, M.NOT_PROTECTED),
    (E.UNPROTECT, None, S.IDLE, M.UNPROTECTED),
    ("holding", None, None, M.ARBITER_SILENT),
    (E.LINK_LOST, None, S.SUSPECT, M.SUSPECT),
    ("waiting", None, None, M.WAITING),
    (E.WON, None, S.TAKING_OVER, M.TAKING_OVER),
    (E.ORDERED, None, S.TAKING_OVER, M.TAKING_OVER),
    (E.HANDED_OVER, None, S.TAKING_OVER, M.TAKING_OVER),
    (E.RUNNING, None, S.ACTIVE, M.TAKEN_OVER),
    (E.TAKEN, None, None, M.SWITCHED),
    (E.NOT_TAKEN, None, None, M.NOT_SWITCHED),
    (E.STALE, None, S.FENCED, M.FENCED),
    (E.LOST, None, S.FENCED, M.FENCED),
    ("stopped", None, None, M.STOPPED),
    ("gone", None, None, M.STOPPED),
    ("stop-failed", None, None, M.STOP_FAILED),
    (E.GUEST_ENDED, None, None, M.GUEST_ENDED),
    (E.STANDBY_DIED, None, None, M.STANDBY_DIED),
    (E.DROPPED, None, S.IDLE, M.REPLICA_DROPPED),
    (E.LOST, None, S.IDLE, M.REPLICA_DROPPED),
    (E.LINK_LOST, None, S.IDLE, M.REPLICA_DROPPED),
    (E.REFUSED, S.PREPARING, S.IDLE, M.OFFER_REFUSED),
    (E.REFUSED, None, None, M.OFFER_REFUSED),
    ("not-remembered", None, None, M.NOT_REMEMBERED),
    ("taken-up", None, None, M.TAKEN_UP),
    ("limit-raised", None, None, M.LIMIT_RAISED),
    ("output", None, None, M.OUTPUT_STUCK),
    ("network", None, None, M.NETWORK),
)


def message_of(event: str, before: str | None, after: str | None) -> Message | None:
    """What kind of entry `event` is; states as far as they are told."""
    for word, then, now, message in _RULES:
        if word == event and then in (None, before) and now in (None, after):
            return message
    return None


@frozen
class Field:
    """A field of the journal: its name there, and what it holds, in words for the documentation."""

    name: str
    meaning: str


FIELDS = {
    "vm": Field("CURLING_VM", "the VM's name"),
    "event": Field("CURLING_EVENT", "the word from the table of [events](#events)"),
    "state": Field("CURLING_STATE", "the [state](#states) the VM is in now, on this host"),
    "before": Field("CURLING_STATE_BEFORE", "the state it was in, if the event changed it"),
    "generation": Field(
        "CURLING_GENERATION", "of the VM, as this host knows it: it rises with every takeover"
    ),
    "peer": Field("CURLING_PEER", "the other host's curlingd, as `peer` names it"),
    "theirs": Field("CURLING_GENERATION_THERE", "the newer generation that the other host showed"),
    "failover_ms": Field(
        "CURLING_FAILOVER_MS", "from the decision to run to the running guest, milliseconds"
    ),
    "looked_at_bytes": Field(
        "CURLING_DISK_LOOKED_AT", "bytes of the disks in which their copies could differ"
    ),
    "sent_bytes": Field("CURLING_DISK_SENT", "bytes that had to be sent for them"),
}
"""What an event of ours carries, by its name there."""


def journal_fields(vm: str, event: str, carried: Mapping[str, object]) -> dict[str, object]:
    """The fields of the journal for an event and what it carries; None values are left out."""
    values = {**carried, "vm": vm or None, "event": event}
    found = {_name(name): value for name, value in values.items() if value is not None}
    message = message_of(event, _word(carried.get("before")), _word(carried.get("state")))
    if message is not None:
        found["MESSAGE_ID"] = message.value
    return found


def _name(name: str) -> str:
    known = FIELDS.get(name)
    return known.name if known else "CURLING_" + re.sub("[^A-Z0-9_]", "_", name.upper())[:50]


def _word(value: object) -> str | None:
    return value if isinstance(value, str) else None
