"""What the daemon logs, sent to systemd's journal with its fields instead of as lines on stderr.

libsystemd does the same in C; its Python module has to be compiled against it. Sources:
https://systemd.io/JOURNAL_NATIVE_PROTOCOL/, systemd.exec(5) for JOURNAL_STREAM.
"""

from __future__ import annotations

import logging
import os
import socket
import sys
from collections.abc import Mapping
from pathlib import Path

from curling_fd.journald.entry import encode
from curling_fd.journald.messages import IDENTIFIER

SOCKET = "/run/systemd/journal/socket"

#: Attribute of a log record that holds more fields for the journal.
EXTRA = "journal_fields"

#: From Python's levels to those of syslog(3), which PRIORITY has.
_PRIORITIES = ((logging.CRITICAL, 2), (logging.ERROR, 3), (logging.WARNING, 4), (logging.INFO, 6))
_DEBUG = 7


class JournalHandler(logging.Handler):
    """Sends each record as one entry.

    It never waits: a journal that does not take entries must not stop checkpoints. What it did not take is
    counted, and the number is in the next entry that it takes. Records go to `fallback` instead while there
    is no journal at all.
    """

    def __init__(self, path: str, fallback: logging.Handler) -> None:
        super().__init__()
        # logging.basicConfig would set one that says the level, which is a field here.
        self.setFormatter(logging.Formatter("%(message)s"))
        self._path = path
        self._fallback = fallback
        self._lost = 0
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)

    def emit(self, record: logging.LogRecord) -> None:
        try:
            entry = self._entry(record)
        except Exception:
            self.handleError(record)
            return
        try:
            # By its path each time: journald may have been replaced since.
            self._socket.sendto(entry, self._path)
            self._lost = 0
        except BlockingIOError:
            self._lost += 1
        except OSError:
            self._fallback.emit(record)

    def close(self) -> None:
        self._socket.close()
        super().close()

    def _entry(self, record: logging.LogRecord) -> bytes:
        fields: dict[str, object] = {
            "MESSAGE": self.format(record),
            "PRIORITY": priority(record.levelno),
            "SYSLOG_IDENTIFIER": IDENTIFIER,
        }
        more: Mapping[str, object] = getattr(record, EXTRA, {})
        if self._lost:
            fields["CURLING_ENTRIES_LOST"] = self._lost
        return encode(fields | dict(more))


def priority(level: int) -> int:
    """A level of Python's logging as syslog has it."""
    return next((number for least, number in _PRIORITIES if level >= least), _DEBUG)


def handler(environ: Mapping[str, str], *, stderr: int = 2, path: str = SOCKET) -> logging.Handler:
    """What to log with: the journal if systemd has connected stderr to it, else lines on stderr.

    Args:
        stderr: our standard error, borrowed.
        path: of the journal's socket.
    """
    lines = logging.StreamHandler(sys.stderr)
    if not is_journal(environ.get("JOURNAL_STREAM", ""), stderr):
        lines.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
        return lines
    # Every line of stderr is an entry of its own there, with a time of its own.
    lines.setFormatter(logging.Formatter("%(levelname)s %(message)s"))
    return JournalHandler(path, lines) if Path(path).is_socket() else lines


def is_journal(stream: str, fd: int) -> bool:
    """Whether `fd` (borrowed) is the journal, as JOURNAL_STREAM says: "device:inode".

    The variable alone does not tell: it is inherited by programs whose output goes elsewhere.
    """
    try:
        status = os.fstat(fd)
    except OSError:
        return False
    return stream == f"{status.st_dev}:{status.st_ino}"
