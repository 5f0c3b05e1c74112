"""What is wrong is refused with its own words and its own exit code, and nothing is changed by it."""

from __future__ import annotations

import json
import os
import random
import re
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import pytest
import trio
from attrs import frozen

from curling_fd.ctl.exit_codes import ExitCode
from curling_fd.link.frames import HEADER_SIZE, PROTOCOL, TRAILER_SIZE, Header, Kind, encode_json
from tests.integration.stage import VM, Stage, stage
from tests.lab.cluster import Node, cluster, start_all
from tests.lab.guests import BootSectorGuest
from tests.lab.hosts import Host
from tests.lab.roots import Executable
from tests.lab.vm import LabVm
from tests.lab.witness import witness

pytestmark = pytest.mark.qemu

NOBODY = 65534

#: Seconds; far above what is needed, for what it bounds waits for an answer.
PATIENCE = 60.0


@frozen
class Refusal:
    """What curlingctl said: in words, and as --json has it."""

    words: str
    error: str
    text: str
    remedy: str
    facts: dict[str, Any]


async def refused(node: Node, *arguments: str, code: ExitCode) -> Refusal:
    """Run a command that must fail, for people and for programs, and return what it says."""
    with trio.fail_after(PATIENCE):
        told = await trio.to_thread.run_sync(node.ctl, *arguments)
        shown = await trio.to_thread.run_sync(node.ctl, "--json", *arguments)
    assert (told.returncode, told.stdout) == (code, ""), told
    assert (shown.returncode, shown.stderr) == (code, ""), shown
    document = json.loads(shown.stdout)
    assert told.stderr.startswith("curlingctl: ")
    assert "What to do: " in told.stderr
    assert document["text"].endswith(".")
    assert document["remedy"].endswith(".")
    return Refusal(told.stderr, document["error"], document["text"], document["remedy"], document["facts"])


@asynccontextmanager
async def nothing_changes(here: Stage) -> AsyncIterator[None]:
    """See that in the block nothing happens to guest, QEMU and states; and that the guest goes on after it."""
    async with witness(here.vm.operator) as guest:

        async def facts() -> dict[str, Any]:
            vms = [await node.show(VM) for node in (here.primary, here.backup)]
            return {
                "status": await guest.qmp.status(),
                "capabilities": await guest.qmp.execute("query-migrate-capabilities"),
                "parameters": await guest.qmp.execute("query-migrate-parameters"),
                "vms": [(vm["role"], vm["state"], vm["generation"]) for vm in vms],
                "processes": [len(host.pids()) for host in (here.alpha, here.beta)],
            }

        before = await facts()
        yield
        assert await facts() == before
        assert not guest.stops
        await here.vm.console.next_round()


@asynccontextmanager
async def unprotected(vm: LabVm, **keys: Any) -> AsyncIterator[Stage]:
    """A VM that somebody will try to protect."""
    async with stage(vm, automatic=False, **keys) as here:
        yield here


async def restart(node: Node, **keys: Any) -> None:
    """Start a node's daemon anew, with other `keys` in the VM's file."""
    await node.stop()
    node.configure_vm(VM, **keys)
    node.start()
    await node.ready()


async def cannot_be_protected(here: Stage, code: ExitCode) -> Refusal:
    """Try to protect the VM, and see that nothing comes of it."""
    async with nothing_changes(here):
        return await refused(here.primary, "protect", VM, code=code)


def small(qemu: Executable, **settings: Any) -> LabVm:
    """A VM that is there in a second."""
    return LabVm(qemu=qemu, guest=BootSectorGuest(), **settings)


@pytest.fixture
async def nodes(host_pair: tuple[Host, Host]) -> AsyncIterator[tuple[Node, Node]]:
    """Two hosts with daemons that have not been started."""
    async with cluster(host_pair) as pair:
        yield pair


# Configuration.


@pytest.mark.parametrize(
    ("name", "text", "says", "advises"),
    [
        ("curlingd.toml", 'lissen = "127.0.0.1:1"', "lissen: unknown key", "Did you mean listen?"),
        ("curlingd.toml", "insecure = 1", "insecure: ", "insecure"),
        ("curlingd.toml.d/a.toml", 'host_nam = "a"', "host_nam: unknown key", "Did you mean host_name?"),
        ("curlingd.toml.d/a.toml", "failure_timeout = 5", "failure_timeout: ", "failure_timeout"),
        ("vms/lab.toml", 'qpm = "/run/lab.sock"', "qpm: unknown key", "Did you mean qmp?"),
        ("vms/lab.toml", "buffers = true", "buffers: ", "buffers"),
        ("vms/lab.toml", '[standby]\nqmeu = "/bin/qemu"', "standby.qmeu: unknown", "Did you mean standby.qemu?"),
        ("vms/lab.toml", '[standby]\nextra_args = "-S"', "standby.extra_args: ", "standby.extra_args"),
    ],
)
async def test_a_wrong_key_or_value_in_any_file(
    name: str, text: str, says: str, advises: str, nodes: tuple[Node, Node]
) -> None:
    node = nodes[0]
    start_all_of = node.config.parent / name
    start_all_of.parent.mkdir(exist_ok=True)
    if name == "curlingd.toml":
        text = node.config.read_text() + ("" if "insecure" in text else text)
        text = text.replace("insecure = true", "insecure = 1") if "insecure" in advises else text
    start_all_of.write_text(text + "\n")

    refusal = await refused(node, "check-config", str(node.config), code=ExitCode.CONFIG)
    assert refusal.error == "ConfigError"
    assert refusal.text.startswith(f"{start_all_of}: {says}")
    assert advises in refusal.remedy

    node.start()
    assert node.process is not None
    assert await trio.to_thread.run_sync(node.process.wait) == os.EX_CONFIG
    assert f"curlingd: {refusal.text}\n{refusal.remedy}" in node.log_text()
    assert not node.socket.exists()


# QEMU's monitor.


async def test_a_qmp_socket_that_is_missing(nodes: tuple[Node, Node], tmp_path: Path) -> None:
    nodes[0].configure_vm(VM, qmp=str(tmp_path / "none.sock"), peer=nodes[1].link)
    await start_all(nodes[0])
    refusal = await refused(nodes[0], "protect", VM, code=ExitCode.QEMU)
    assert refusal.error == "QmpUnreachable"
    assert refusal.text == f"QEMU's monitor at {tmp_path}/none.sock cannot be reached: No such file or directory."
    assert f"-qmp unix:{tmp_path}/none.sock,server=on,wait=off" in refusal.remedy
    assert (await nodes[0].show(VM))["state"] == "idle"


async def test_a_qmp_socket_that_is_none(unstable_qemu: Executable) -> None:
    async with unprotected(small(unstable_qemu)) as here:
        hmp = here.vm.directory / "hmp.sock"
        await add_monitor(here, hmp)
        await restart(here.primary, qmp=str(hmp), peer=here.backup.link)
        refusal = await cannot_be_protected(here, ExitCode.QEMU)
        assert refusal.error == "QmpNotQmp"
        assert "does not speak QMP; it began with" in refusal.text
        assert "QEMU" in refusal.facts["got"]


async def add_monitor(here: Stage, path: Path) -> None:
    """A socket on which the human monitor's banner is all that ever comes."""
    here.vm.directory.chmod(0o755)

    async def banner(stream: trio.SocketStream) -> None:
        await stream.send_all(b"QEMU 11.1.3 monitor - type 'help' for more information\r\n(qemu) ")
        await trio.sleep_forever()

    raise NotImplementedError


async def test_a_qmp_socket_we_may_not_open(unstable_qemu: Executable) -> None:
    async with unprotected(small(unstable_qemu)) as here:
        await here.primary.stop()
        start_as_nobody(here.primary, here.alpha)
        await here.primary.ready()
        refusal = await cannot_be_protected(here, ExitCode.QEMU)
        assert refusal.error == "QmpUnreachable"
        assert refusal.text.endswith("cannot be reached: Permission denied.")


async def test_a_qmp_socket_that_another_monitor_uses(unstable_qemu: Executable) -> None:
    async with unprotected(small(unstable_qemu)) as here, await trio.open_unix_socket(str(here.vm.qmp)):
        refusal = await cannot_be_protected(here, ExitCode.QEMU)
        assert refusal.error == "QmpBusy"
        assert refusal.text.startswith(f"Another client holds QEMU's monitor at {here.vm.qmp}")
        assert "a second '-qmp" in refusal.remedy
