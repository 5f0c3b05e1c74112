"""What systemd's journal gets: the bytes of an entry, the kinds of entries, and where lines go without it."""

from __future__ import annotations

import io
import logging
import os
import re
import socket
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from curling_fd.failover.states import TABLE, Event, State
from curling_fd.journald.entry import LONGEST, encode
from curling_fd.journald.messages import FIELDS, Message, journal_fields, message_of
from curling_fd.journald.sender import EXTRA, JournalHandler, handler, is_journal
from curling_fd.service.journal import Journal
from curling_fd.service.record import _LOUD

SERVICE = Path(__file__).parents[2] / "curling_fd/service"


def decode(entry: bytes) -> dict[str, bytes]:
    """Read an entry as journald does; a name that comes twice is an error here."""
    fields: dict[str, bytes] = {}
    while entry:
        line, _, rest = entry.partition(b"\n")
        name, equals, value = line.partition(b"=")
        if not equals:
            (length,) = struct.unpack_from("<Q", rest)
            value, rest = rest[8 : 8 + length], rest[8 + length :]
            assert rest[:1] == b"\n"
            rest = rest[1:]
        assert name.decode() not in fields
        fields[name.decode()] = value
        entry = rest
    return fields


# Entries.


def test_an_entry_is_a_line_for_each_field() -> None:
    entry = encode({"MESSAGE": "db1: lost: \N{GREEK SMALL LETTER ALPHA}", "PRIORITY": 3})
    assert entry == b"MESSAGE=db1: lost: \xce\xb1\nPRIORITY=3\n"


def test_a_value_with_a_line_break_has_its_length_before_it() -> None:
    entry = encode({"MESSAGE": "two\nlines", "PRIORITY": 6})
    assert entry == b"MESSAGE\n\x09\0\0\0\0\0\0\0two\nlines\nPRIORITY=6\n"


@given(st.dictionaries(st.from_regex(r"[A-Z][A-Z0-9_]{0,63}", fullmatch=True), st.text(), max_size=5))
def test_any_text_arrives_as_it_was_sent(fields: dict[str, str]) -> None:
    sent = {name: text.encode(errors="backslashreplace") for name, text in fields.items()}
    assert decode(encode(fields)) == sent


def test_bytes_that_are_no_text_do_not_keep_an_entry_from_being_sent() -> None:
    path = os.fsdecode(b"/srv/\xff")
    assert decode(encode({"MESSAGE": path})) == {"MESSAGE": rb"/srv/\udcff"}


def test_a_value_too_long_for_a_datagram_is_cut() -> None:
    value = decode(encode({"MESSAGE": "x" * 1_000_000}))["MESSAGE"]
    assert len(value) == LONGEST
    assert value.endswith(b"x ... (cut)")


@pytest.mark.parametrize("name", ["", "_PID", "1ST", "lower", "A=B", "A\nB", "A" * 65])
def test_a_name_that_journald_would_drop_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="no name for a field"):
        encode({name: "x"})


# Kinds of entries.


def test_every_kind_of_entry_comes_from_something_that_can_happen() -> None:
    source = "".join(path.read_text("utf-8") for path in SERVICE.glob("*.py"))
    noted = {
        word for call in re.findall(r"\.note\(([^,]+),", source) for word in re.findall(r'"([a-z-]+)"', call)
    }
    changes = [(event, before, after) for (before, event), after in TABLE.items()]
    reached = {message_of(*change) for change in changes} | {message_of(word, None, None) for word in noted}
    assert reached - {None} == set(Message) - {Message.CANNOT_START}


def test_every_loud_event_has_an_explanation() -> None:
    for (before, event), after in TABLE.items():
        if event in _LOUD:
            assert message_of(event, before, after) is not None, (before, event)


@pytest.mark.parametrize(
    ("event", "before", "after", "message"),
    [
        ("committed", "syncing", "protected", Message.PROTECTED),
        ("committed", "filling", "standby", Message.REPLICA_READY),
        ("link-lost", "protected", "holding", Message.PROTECTION_LOST),
        ("link-lost", "switching", "holding", Message.SWITCH_IN_DOUBT),
        ("link-lost", "connecting", "unprotected", Message.NOT_PROTECTED),
        ("link-lost", "standby", "suspect", Message.SUSPECT),
        ("won", "holding", "unprotected", Message.RUNS_ALONE),
        ("won", "suspect", "taking-over", Message.TAKING_OVER),
        ("lost", "holding", "fenced", Message.FENCED),
        ("lost", "suspect", "idle", Message.REPLICA_DROPPED),
        ("refused", None, None, Message.OFFER_REFUSED),
        ("paused", None, "protected", None),
        ("protect", "idle", "connecting", None),
    ],
)
def test_the_same_event_means_what_the_states_around_it_make_of_it(
    event: str, before: str | None, after: str | None, message: Message | None
) -> None:
    assert message_of(event, before, after) is message


def test_ids_are_what_journald_takes_and_each_is_used_once() -> None:
    ids = [message.value for message in Message.__members__.values()]
    assert all(re.fullmatch("[0-9a-f]{32}", id) for id in ids)
    assert len(set(ids)) == len(ids)


def test_the_fields_of_an_event() -> None:
    carried = {"state": "fenced", "before": "holding", "generation": 3, "theirs": 4, "peer": None}
    assert journal_fields("db1", "lost", carried) == {
        "CURLING_VM": "db1",
        "CURLING_EVENT": "lost",
        "CURLING_STATE": "fenced",
        "CURLING_STATE_BEFORE": "holding",
        "CURLING_GENERATION": 3,
        "CURLING_GENERATION_THERE": 4,
        "MESSAGE_ID": Message.FENCED.value,
    }
    assert journal_fields("", "started", {"how-ever": 1}) == {
        "CURLING_EVENT": "started",
        "CURLING_HOW_EVER": 1,
    }


def test_every_field_that_an_event_can_carry_is_in_the_table() -> None:
    carried = set()
    for path in SERVICE.glob("*.py"):
        for call in re.findall(
            r"(?:\.note|\.advance|journal\.add)\(((?:[^()]|\([^()]*\))*)\)", path.read_text("utf-8")
        ):
            carried |= set(re.findall(r"(?<![\w.])([a-z_]+)=", call))
    assert carried - {"level"} == FIELDS.keys() - {"vm", "event"}


# Sending.


class FakeJournal:
    """What listens at the journal's socket."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
        self.socket.bind(self.path)

    def entries(self) -> list[dict[str, bytes]]:
        found = []
        while True:
            try:
                found.append(decode(self.socket.recv(1 << 20)))
            except BlockingIOError:
                return found

    def close(self) -> None:
        self.socket.close()
        Path(self.path).unlink(missing_ok=True)


@pytest.fixture
def journal(tmp_path: Path) -> Iterator[FakeJournal]:
    fake = FakeJournal(tmp_path / "socket")
    yield fake
    fake.close()


@pytest.fixture
def stderr() -> io.StringIO:
    return io.StringIO()


@pytest.fixture
def logger(journal: FakeJournal, stderr: io.StringIO) -> Iterator[logging.Logger]:
    """One that sends to `journal`, and to `stderr` without it."""
    sender = JournalHandler(journal.path, logging.StreamHandler(stderr))
    logger = logging.Logger("curling")
    logger.addHandler(sender)
    yield logger
    sender.close()


def test_a_line_arrives_once_with_its_priority(
    journal: FakeJournal, logger: logging.Logger, stderr: io.StringIO
) -> None:
    logger.error("it %s", "broke")
    assert journal.entries() == [{"MESSAGE": b"it broke", "PRIORITY": b"3", "SYSLOG_IDENTIFIER": b"curlingd"}]
    assert stderr.getvalue() == ""


@pytest.mark.parametrize(
    ("level", "priority"),
    [("DEBUG", b"7"), ("INFO", b"6"), ("WARNING", b"4"), ("ERROR", b"3"), ("CRITICAL", b"2")],
)
def test_levels_are_those_of_syslog(
    journal: FakeJournal, logger: logging.Logger, level: str, priority: bytes
) -> None:
    logger.log(logging.getLevelName(level), "x")
    assert journal.entries()[0]["PRIORITY"] == priority


def test_a_traceback_is_one_entry(journal: FakeJournal, logger: logging.Logger) -> None:
    try:
        raise ValueError("inner")
    except ValueError:
        logger.exception("outer")
    (entry,) = journal.entries()
    assert entry["MESSAGE"].startswith(b"outer\nTraceback")
    assert entry["MESSAGE"].endswith(b"ValueError: inner")


def test_an_event_brings_its_fields(journal: FakeJournal, logger: logging.Logger) -> None:
    logger.warning("x", extra={EXTRA: journal_fields("db1", "waiting", {"state": "suspect"})})
    (entry,) = journal.entries()
    assert entry["CURLING_VM"] == b"db1"
    assert entry["CURLING_STATE"] == b"suspect"
    assert entry["MESSAGE_ID"].decode() == Message.WAITING.value


def test_an_event_of_the_daemon_arrives_with_its_fields(
    journal: FakeJournal, logger: logging.Logger, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("curling_fd.service.journal._logger", logger)
    Journal().add(
        "db1", Event.LOST, "holding -> fenced", level=logging.ERROR, state=State.FENCED, before=State.HOLDING
    )
    (entry,) = journal.entries()
    assert entry["MESSAGE"] == b"db1: lost: holding -> fenced"
    assert entry["MESSAGE_ID"].decode() == Message.FENCED.value
    assert (entry["PRIORITY"], entry["CURLING_VM"], entry["CURLING_EVENT"]) == (b"3", b"db1", b"lost")


def test_without_a_journal_lines_go_to_stderr_until_it_is_back(
    journal: FakeJournal, logger: logging.Logger, stderr: io.StringIO
) -> None:
    journal.close()
    logger.warning("while it is away")
    assert stderr.getvalue() == "while it is away\n"
    again = FakeJournal(Path(journal.path))
    logger.warning("back")
    assert [entry["MESSAGE"] for entry in again.entries()] == [b"back"]
    assert stderr.getvalue() == "while it is away\n"
    again.close()


def test_a_journal_that_does_not_read_holds_nobody_up_and_hears_what_it_missed(
    journal: FakeJournal, logger: logging.Logger, stderr: io.StringIO
) -> None:
    for number in range(2000):  # more than any queue of datagrams holds
        logger.info("line %s %s", number, "x" * 1000)
    taken = len(journal.entries())
    assert 0 < taken < 2000
    logger.info("the next")
    logger.info("and one more")
    told, after = journal.entries()
    assert told["CURLING_ENTRIES_LOST"] == str(2000 - taken).encode()
    assert "CURLING_ENTRIES_LOST" not in after
    assert stderr.getvalue() == ""


# Where lines go.


@pytest.fixture
def output(tmp_path: Path) -> Iterator[int]:
    """A file in the place of stderr."""
    fd = os.open(tmp_path / "stderr", os.O_RDWR | os.O_CREAT)
    yield fd
    os.close(fd)


def stream_of(fd: int) -> str:
    return f"{os.fstat(fd).st_dev}:{os.fstat(fd).st_ino}"


def test_the_journal_is_used_where_stderr_is_connected_to_it(journal: FakeJournal, output: int) -> None:
    used = handler({"JOURNAL_STREAM": stream_of(output)}, stderr=output, path=journal.path)
    assert isinstance(used, JournalHandler)
    used.close()


def test_a_redirected_stderr_gets_the_lines_though_the_variable_is_set(
    journal: FakeJournal, output: int
) -> None:
    for environ in ({}, {"JOURNAL_STREAM": ""}, {"JOURNAL_STREAM": "1:2"}, {"JOURNAL_STREAM": "no"}):
        assert not isinstance(handler(environ, stderr=output, path=journal.path), JournalHandler)
    assert not is_journal("", 1 << 20)


def test_a_stderr_of_the_journal_is_used_when_its_socket_is_not_there(output: int, tmp_path: Path) -> None:
    used = handler({"JOURNAL_STREAM": stream_of(output)}, stderr=output, path=str(tmp_path / "none"))
    assert type(used) is logging.StreamHandler
    line = used.format(logging.LogRecord("curling", logging.INFO, "", 0, "x", (), None))
    assert line == "INFO x"
