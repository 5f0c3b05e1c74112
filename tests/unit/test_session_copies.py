"""What the backup remembers of its copies of disks from one session to the next."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import trio

from curling_fd.disk.inventory import Disk
from curling_fd.disk.log import WRITE, encode
from curling_fd.disk.markers import MarkerStore
from curling_fd.errors import CopyMissing, CopyUnusable
from curling_fd.service.copies import Closing, SessionCopies

SIZE = 1 << 20
DISKS = (Disk("a", SIZE, "raw", "/on/primary/a"), Disk("b", SIZE, "raw", "/on/primary/b"))
BASIS = "ab12"


class Copied:
    """Two copies, and sessions that follow each other."""

    def __init__(self, folder: Path) -> None:
        self.paths = [str(folder / disk.name) for disk in DISKS]
        for path in self.paths:
            Path(path).touch()
            os.truncate(path, SIZE)
        (folder / "state").mkdir()
        self.store = MarkerStore(folder / "state")

    def session(self, basis: str = BASIS) -> SessionCopies:
        return SessionCopies.open("db1", self.store, DISKS, self.paths, basis, 3)

    def after_a_session(self) -> None:
        """One has filled them, and ended in order."""
        copies = self.session()
        write(copies)
        copies.end()


def write(copies: SessionCopies) -> None:
    log = memoryview(encode(WRITE, 1, 4096, 5) + b"hello")
    copies.copies.check(log, 0, len(log))
    copies.begun = True
    copies.copies.apply(log, 0, len(log))


@pytest.fixture
def copied(tmp_path: Path) -> Copied:
    return Copied(tmp_path)


def test_copies_are_known_by_the_basis_of_the_session_that_filled_them(copied: Copied) -> None:
    copied.after_a_session()
    copies = copied.session()
    assert copies.alike == (True, True)
    assert Path(copied.paths[1]).read_bytes()[4096:4101] == b"hello"
    copies.end()
    other = copied.session("cd34")
    assert other.alike == (False, False)
    other.end()


def test_copies_nobody_knows_of_are_in_doubt(copied: Copied) -> None:
    copies = copied.session()
    assert copies.alike == (False, False)
    copies.end()  # nothing was sent: whatever is in them is not what the primary thinks
    again = copied.session()
    assert again.alike == (False, False)
    again.end()


def test_a_daemon_that_is_killed_leaves_them_in_doubt(copied: Copied) -> None:
    copied.after_a_session()
    copied.session().copies.close()
    copies = copied.session()
    assert copies.alike == (False, False)
    copies.end()


def test_a_copy_that_the_vm_was_taken_over_with_is_in_doubt(copied: Copied) -> None:
    copied.after_a_session()
    copies = copied.session()
    write(copies)
    copies.give_away()
    again = copied.session()
    assert again.alike == (False, False)
    again.end()


def test_a_copy_that_could_not_be_written_is_in_doubt(copied: Copied) -> None:
    copies = copied.session()
    copies.begun = copies.spoiled = True
    copies.end()
    again = copied.session()
    assert again.alike == (False, False)
    again.end()


def test_a_session_that_sent_nothing_changes_nothing(copied: Copied) -> None:
    copied.after_a_session()
    copied.session("cd34").end()
    copies = copied.session()
    assert copies.alike == (True, True)
    copies.end()


def test_a_file_that_somebody_has_touched_is_in_doubt(copied: Copied) -> None:
    copied.after_a_session()
    os.utime(copied.paths[0], ns=(1, 1))
    copies = copied.session()
    assert copies.alike == (False, True)
    copies.end()


def test_copies_are_opened_all_or_none(copied: Copied) -> None:
    os.unlink(copied.paths[1])
    with pytest.raises(CopyMissing):
        copied.session()
    Path(copied.paths[1]).touch()
    os.truncate(copied.paths[1], SIZE)
    copied.session().end()


def test_the_next_daemon_goes_on_with_them_unless_somebody_was_quicker(copied: Copied) -> None:
    copies = copied.session()
    write(copies)
    copies.sequence = 7
    copies.end()
    inherited = SessionCopies.inherit("db1", copied.store, copies.left())
    assert (inherited.sequence, inherited.show()[0]["state"]) == (7, "copy")
    inherited.end()
    os.utime(copied.paths[0], ns=(1, 1))
    with pytest.raises(CopyUnusable, match="while curlingd was restarted"):
        SessionCopies.inherit("db1", copied.store, copies.left())
    copied.session().end()


async def test_who_opens_copies_again_waits_until_they_are_closed(copied: Copied) -> None:
    async with trio.open_nursery() as nursery:
        closing = Closing(nursery)
        await closing.done()
        closing.begin(copied.session())
        await closing.done()
        copied.session().end()
