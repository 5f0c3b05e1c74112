"""Words, units, ages and exit codes of curlingctl."""

from __future__ import annotations

from typing import Any

import pytest

from curling_fd import errors
from curling_fd.ctl import words
from curling_fd.ctl.exit_codes import _CODES, MEANINGS, ExitCode, exit_code
from curling_fd.ctl.render import plain_table
from curling_fd.varlink.protocol import ErrorReply
from tests.unit.ctl_fake import STATISTICS, vm
from tests.unit.test_sentences import CLASSES, example


@pytest.mark.parametrize("kind", CLASSES)
def test_every_error_has_an_exit_code_that_is_not_success(kind: type[errors.CurlingError]) -> None:
    assert exit_code(example(kind)) not in (ExitCode.OK, ExitCode.USAGE, ExitCode.INTERRUPTED)


def test_every_class_below_the_root_belongs_to_a_group_with_a_code() -> None:
    for kind in CLASSES:
        assert kind is errors.CurlingError or any(base in _CODES for base in kind.__mro__[:-4])


def test_every_exit_code_has_a_meaning() -> None:
    assert set(MEANINGS) == set(ExitCode)


def test_codes_are_interface() -> None:
    assert {code.name: int(code) for code in ExitCode} == {
        "OK": 0,
        "FAILED": 1,
        "USAGE": 2,
        "NO_DAEMON": 3,
        "NOT_PERMITTED": 4,
        "NO_SUCH_VM": 5,
        "REFUSED": 6,
        "PRECHECK": 7,
        "PEER": 8,
        "QEMU": 9,
        "CONFIG": 10,
        "CAPTURE": 11,
        "ARBITER": 12,
        "ENDED": 13,
        "INTERRUPTED": 130,
    }


def test_an_error_of_a_newer_daemon_is_a_failure() -> None:
    assert exit_code(ErrorReply("io.curling.Control.FullMoon", {})) == ExitCode.FAILED
    assert exit_code(ErrorReply("org.varlink.service.PermissionDenied", {})) == ExitCode.NOT_PERMITTED


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(-5, "just now"), (0.9, "just now"), (1, "1 s ago"), (119, "119 s ago"), (120, "2 min ago"),
     (7199, "119 min ago"), (7200, "2 h ago"), (172_799, "47 h ago"), (172_800, "2 days ago")],
)  # fmt: skip
def test_ages_are_coarse(seconds: float, text: str) -> None:
    assert words.age(seconds) == text


def test_a_whole_is_reached_only_when_all_is_done() -> None:
    assert words.percent(999, 1000) == 99
    assert words.percent(1000, 1000) == 100
    assert words.percent(0, 0) == 100


@pytest.mark.parametrize(
    "sent", [{}, {"statistics": None}, {"statistics": {}}, {"progress": {}, "paused": None}]
)
def test_a_daemon_of_another_version_may_leave_fields_out(sent: dict[str, Any]) -> None:
    for row in (words.list_row(sent), words.watch_row(sent)):
        assert set(row) == {words.NOTHING}
    assert dict(words.details(sent))["state"] == words.NOTHING
    assert words.event_line({}, 0.0)


def test_before_the_first_checkpoint_there_are_no_numbers() -> None:
    zeros = {**dict.fromkeys(STATISTICS, 0), "detection_ms": None, "failover_ms": None}
    row = dict(zip(words.LIST_HEADERS, words.list_row(vm("a", statistics=zeros)), strict=True))
    assert [row[name] for name in ("CKPT/S", "STOP", "LAG")] == [words.NOTHING] * 3
    assert "lag" not in dict(words.details(vm("a", statistics=zeros)))


@pytest.mark.parametrize(
    ("word", "style"),
    [("protected", "green"), ("protected, paused", "yellow"), ("unprotected", "bold red"), ("new-state", "")],
)
def test_colours_follow_the_state(word: str, style: str) -> None:
    assert words.style_of(word) == style


def test_plain_tables_align_and_cut_nothing() -> None:
    assert plain_table([("A", "B"), ("long cell", "x" * 200), ("", "y")]) == [
        "A          B",
        "long cell  " + "x" * 200,
        "           y",
    ]
