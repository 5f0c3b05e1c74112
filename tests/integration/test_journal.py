"""The daemon and systemd's own journal: every entry once, with its fields, and explained by the catalog."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import trio
from attrs import frozen

from curling_fd.ctl.exit_codes import ExitCode
from curling_fd.journald.messages import Message
from tests.lab.cluster import Node

ROOT = Path(__file__).resolve().parents[2]
JOURNALD = "/usr/lib/systemd/systemd-journald"
VM = "db1"

#: Kernel messages and the kernel's auditing are not this journal's business.
SETTINGS = "[Journal]\nStorage=volatile\nReadKMsg=no\nAudit=\nForwardToWall=no\nRateLimitIntervalSec=0\n"

#: Makes a /run of its own, and waits for nothing: `journalctl --sync` does that.
START = f"""
set -e
mount -t tmpfs tmpfs /run
mkdir -p /run/systemd/journald.conf.d /run/log/journal
printf '{SETTINGS}' >/run/systemd/journald.conf.d/lab.conf
exec {JOURNALD}
"""


@frozen
class Journal:
    """A journald that only the processes of one mount namespace see."""

    pid: int

    def inside(self, *command: str) -> Sequence[str]:
        """A command line that runs `command` where the journal is."""
        return ["nsenter", "--mount", f"--target={self.pid}", f"--wd={ROOT}", "--", *command]

    def run(self, *command: str) -> str:
        return subprocess.run(self.inside(*command), check=True, capture_output=True, text=True).stdout

    def entries(self, *matches: str) -> list[dict[str, Any]]:
        """What was logged up to now and has these fields."""
        self.run("journalctl", "--sync")
        lines = self.run("journalctl", "-q", "-o", "json", *matches).splitlines()
        return [json.loads(line) for line in lines]


@pytest.fixture
def journal(tmp_path: Path) -> Iterator[Journal]:
    """A journal with the catalog of this checkout."""
    namespace = ["unshare", "--mount", "--propagation=private"]
    process = subprocess.Popen([*namespace, "sh", "-c", START])
    try:
        run = Path(f"/proc/{process.pid}/root/run/systemd/journal")
        with_journal = Journal(process.pid)
        while not all((run / name).is_socket() for name in ("socket", "stdout", "io.systemd.journal")):
            assert process.poll() is None, "journald did not start"
            time.sleep(0.01)
        catalog(with_journal, tmp_path / "catalog")
        yield with_journal
    finally:
        process.terminate()
        process.wait()


def catalog(journal: Journal, root: Path) -> None:
    """Have `journalctl -x` use the catalog of this checkout."""
    folder, database = root / "usr/local/lib/systemd/catalog", root / "var/lib/systemd/catalog"
    folder.mkdir(parents=True)
    database.mkdir(parents=True)
    shutil.copy(ROOT / "systemd/curling.catalog", folder)
    journal.run("journalctl", f"--root={root}", "--update-catalog")
    there = Path("/var/lib/systemd/catalog")
    there.mkdir(parents=True, exist_ok=True)
    journal.run("mount", "--bind", str(database), str(there))


#: What systemd tells a service whose stderr it has connected to the journal.
TELL = 'export JOURNAL_STREAM=$(stat -Lc %d:%i /proc/self/fd/2); exec "$@"'


def start(node: Node, journal: Journal) -> None:
    """Start the daemon of `node` as systemd would: with stderr connected to the journal."""
    daemon = [sys.executable, "-m", "curling_fd.service.daemon", "--config", str(node.config)]
    told = ["systemd-cat", "-t", "curlingd", "sh", "-c", TELL, "sh", *daemon]
    node.process = subprocess.Popen(journal.inside(*told))


@pytest.fixture
def node(tmp_path: Path) -> Iterator[Node]:
    node = Node("alpha", tmp_path / "alpha", "127.0.0.1", port=19271, settings={"insecure": False})
    node.directory.mkdir()
    node.configure()
    node.configure_vm(VM, qmp=str(tmp_path / "none.qmp"), peer="127.0.0.1:19272")
    yield node
    node.close()


async def test_an_event_is_in_the_journal_once_with_its_fields_and_its_explanation(
    node: Node, journal: Journal
) -> None:
    start(node, journal)
    await node.ready()
    refused = await trio.to_thread.run_sync(node.ctl, "protect", VM)
    assert refused.returncode == ExitCode.QEMU
    assert await node.stop() == 0

    everything = journal.entries("_TRANSPORT=journal", "SYSLOG_IDENTIFIER=curlingd")
    told = [entry["MESSAGE"] for entry in everything]
    assert len(told) == len(set(told)) > 3
    assert journal.entries("_TRANSPORT=stdout") == []  # nor on stderr

    about = journal.entries(f"CURLING_VM={VM}")
    (entry,) = [entry for entry in about if entry["CURLING_EVENT"] == "refused"]
    assert entry["MESSAGE"].startswith(f"{VM}: refused: connecting -> unprotected: QEMU's monitor at ")
    assert entry["MESSAGE_ID"] == Message.NOT_PROTECTED.value
    assert entry["CURLING_STATE"] == "unprotected"
    assert entry["CURLING_STATE_BEFORE"] == "connecting"
    assert entry["CURLING_GENERATION"] == "0"
    assert entry["CURLING_PEER"] == "127.0.0.1:19272"
    assert [entry["CURLING_EVENT"] for entry in about] == ["protect", "refused", "unprotect"]

    explained = journal.run("journalctl", "-q", "-x", f"MESSAGE_ID={Message.NOT_PROTECTED.value}")
    assert f"Subject: {VM} could not be protected" in explained
    assert f"`curlingctl doctor {VM}` says" in explained
    assert "@" not in explained.replace("@CURLING", "@")


async def test_a_daemon_that_cannot_start_says_so_in_the_journal(node: Node, journal: Journal) -> None:
    with node.config.open("a") as toml:
        toml.write('lissen = "127.0.0.1:1"\n')
    start(node, journal)
    assert node.process is not None
    assert await trio.to_thread.run_sync(node.process.wait) == 78
    (entry,) = journal.entries("SYSLOG_IDENTIFIER=curlingd")
    assert entry["MESSAGE_ID"] == Message.CANNOT_START.value
    assert entry["PRIORITY"] == "2"
    assert entry["MESSAGE"].startswith(f"{node.config}: lissen: unknown key.\nDid you mean listen?")


async def test_every_explanation_is_one_that_journalctl_knows(journal: Journal) -> None:
    listed = journal.run("journalctl", "--list-catalog", *(message.value for message in Message))
    assert [line.split()[0] for line in listed.splitlines()] == [message.value for message in Message]
    for message in Message:
        dumped = journal.run("journalctl", "--dump-catalog", message.value)
        assert "Defined-By: curling" in dumped
