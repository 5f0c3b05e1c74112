"""What is wrong is refused with its own words and its own exit code, and nothing is changed by it."""

from __future__ import annotations

import json
import os
import random
import shutil
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
from curling_fd.link.frames import HEADER_SIZE, PROTOCOL, TRAILER_SIZE, Header, Kind, decode_json, encode_json
from tests.integration.stage import SYNC, VM, Stage, stage
from tests.lab.cluster import Node, cluster, start_all
from tests.lab.guests import BootSectorGuest
from tests.lab.hosts import Host
from tests.lab.roots import Executable
from tests.lab.vm import LabVm
from tests.lab.witness import witness

NOBODY = 65534
GARBAGE = random.Random(2).randbytes(1 << 16)

#: Seconds; far above what is needed, for what it bounds waits for an answer.
PATIENCE = 60.0


@frozen
class Refusal:
    """What curlingctl said."""

    error: str
    text: str
    remedy: str
    facts: dict[str, Any]


async def refused(node: Node, *arguments: str, code: ExitCode) -> Refusal:
    """Run a command that must fail, in words and with --json, and return what it says the second time."""
    told = await trio.to_thread.run_sync(node.ctl, *arguments)
    shown = await trio.to_thread.run_sync(node.ctl, "--json", *arguments)
    return _refusal(told, shown, code)


def _refusal(
    told: subprocess.CompletedProcess[str], shown: subprocess.CompletedProcess[str], code: ExitCode
) -> Refusal:
    assert (told.returncode, told.stdout) == (code, ""), told
    assert (shown.returncode, shown.stderr) == (code, ""), shown
    document = json.loads(shown.stdout)
    assert told.stderr.startswith("curlingctl: ")
    # What a fact is can differ from one time to the next, like the milliseconds since something.
    assert document["text"].partition(": ")[0] in told.stderr
    assert f"What to do: {document['remedy']}\n" in told.stderr
    return Refusal(document["error"], document["text"], document["remedy"], document["facts"])


@asynccontextmanager
async def nothing_changes(here: Stage) -> AsyncIterator[None]:
    """See that in the block nothing happens to guest, QEMU and hosts, and that the guest goes on after it."""

    async def facts() -> dict[str, Any]:
        vms = [await node.show(VM) for node in (here.primary, here.backup)]
        return {
            "status": await guest.qmp.status(),
            "capabilities": await guest.qmp.execute("query-migrate-capabilities"),
            "parameters": await guest.qmp.execute("query-migrate-parameters"),
            "jobs": await guest.qmp.execute("query-block-jobs"),
            "exports": await guest.qmp.execute("query-block-exports"),
            "nodes": sorted(node["node-name"] for node in await guest.qmp.execute("query-named-block-nodes")),
            "vms": [(vm["role"], vm["state"], vm["generation"]) for vm in vms],
            "processes": [len(host.pids()) for host in (here.alpha, here.beta)],
        }

    async with witness(here.vm.operator) as guest:
        before = await facts()
        yield
        assert await facts() == before
        assert not guest.stops
        await here.vm.console.next_round()


async def cannot_be_protected(here: Stage, code: ExitCode) -> Refusal:
    """Try to protect the VM, and see that nothing comes of it."""
    async with nothing_changes(here):
        return await refused(here.primary, "protect", VM, code=code)


def small(qemu: Executable, **settings: Any) -> LabVm:
    """A VM that is there in a second."""
    return LabVm(qemu=qemu, guest=BootSectorGuest(), **settings)


async def restart(node: Node, **keys: Any) -> None:
    """Start the daemon of `node` anew, with other `keys` in the VM's file."""
    await node.stop()
    node.configure_vm(VM, **keys)
    node.start()
    await node.ready()


@pytest.fixture
async def nodes(host_pair: tuple[Host, Host]) -> AsyncIterator[tuple[Node, Node]]:
    """Two hosts whose daemons have not been started."""
    async with cluster(host_pair) as pair:
        yield pair


# Files.


@pytest.mark.parametrize(
    ("name", "text", "key", "advice"),
    [
        ("curlingd.toml", 'lissen = "127.0.0.1:1"', "lissen", "Did you mean listen?"),
        ("curlingd.toml", "control_group = 7", "control_group", "Correct control_group"),
        ("curlingd.toml.d/a.toml", 'host_nam = "a"', "host_nam", "Did you mean host_name?"),
        ("curlingd.toml.d/a.toml", "failure_timeout = 5", "failure_timeout", "Correct failure_timeout"),
        ("vms/lab.toml", 'qpm = "/run/lab.sock"', "qpm", "Did you mean qmp?"),
        ("vms/lab.toml", "buffers = true", "buffers", "Correct buffers"),
        ("vms/lab.toml", '[standby]\nqmeu = "/q"', "standby.qmeu", "Did you mean standby.qemu?"),
        ("vms/lab.toml", '[standby]\nextra_args = "-S"', "standby.extra_args", "Correct standby.extra_args"),
    ],
)
async def test_a_wrong_key_or_a_wrong_type_in_any_file(
    nodes: tuple[Node, Node], name: str, text: str, key: str, advice: str
) -> None:
    node, file = nodes[0], nodes[0].config.parent / name
    file.parent.mkdir(exist_ok=True)
    with file.open("a") as toml:
        toml.write(f"{text}\n")

    refusal = await refused(node, "check-config", str(node.config), code=ExitCode.CONFIG)
    assert refusal.error == "ConfigError"
    assert refusal.text.startswith(f"{file}: {key}: ")
    assert refusal.remedy.startswith(advice)

    node.start()
    assert node.process is not None
    assert await trio.to_thread.run_sync(node.process.wait) == os.EX_CONFIG
    assert f"curlingd: {refusal.text}\n{refusal.remedy}\n" in node.log_text()
    assert not node.socket.exists()


# QEMU's monitor.


async def test_a_qmp_socket_that_is_missing(nodes: tuple[Node, Node], tmp_path: Path) -> None:
    path = tmp_path / "qmp.sock"
    nodes[0].configure_vm(VM, qmp=str(path), peer=nodes[1].link)
    await start_all(nodes[0])
    refusal = await refused(nodes[0], "protect", VM, code=ExitCode.QEMU)
    assert refusal.error == "QmpUnreachable"
    assert refusal.text == f"QEMU's monitor at {path} cannot be reached: No such file or directory."
    assert f"'-qmp unix:{path},server=on,wait=off'" in refusal.remedy
    assert (await nodes[0].show(VM))["state"] == "idle"


@pytest.mark.qemu
async def test_a_qmp_socket_that_is_the_human_monitor(unstable_qemu: Executable, tmp_path: Path) -> None:
    path = tmp_path / "hmp.sock"
    monitor = ["-monitor", f"unix:{path},server=on,wait=off"]
    async with stage(small(unstable_qemu, extra=monitor), automatic=False) as here:
        await restart(here.primary, qmp=str(path), peer=here.backup.link)
        refusal = await cannot_be_protected(here, ExitCode.QEMU)
        assert refusal.error == "QmpNotQmp"
        assert refusal.text.startswith(f"What answers at {path} does not speak QMP; it began with ")
        assert refusal.facts["got"].startswith("QEMU 11.")
        assert "not of a serial console or of the human monitor" in refusal.remedy


@pytest.mark.qemu
async def test_a_qmp_socket_that_another_monitor_holds(unstable_qemu: Executable) -> None:
    async with (
        stage(small(unstable_qemu), automatic=False) as here,
        await trio.open_unix_socket(str(here.vm.qmp)),
    ):
        refusal = await cannot_be_protected(here, ExitCode.QEMU)
        assert refusal.error == "QmpBusy"
        assert refusal.text.startswith(f"Another client holds QEMU's monitor at {here.vm.qmp}")
        assert "add a second '-qmp unix:PATH,server=on,wait=off'" in refusal.remedy


@pytest.mark.qemu
async def test_a_qmp_socket_that_may_not_be_opened(unstable_qemu: Executable) -> None:
    async with stage(small(unstable_qemu), automatic=False) as here:
        await here.primary.stop()
        start_as_nobody(here.primary)
        await here.primary.ready()
        refusal = await cannot_be_protected(here, ExitCode.QEMU)
        assert refusal.error == "QmpUnreachable"
        assert refusal.text == f"QEMU's monitor at {here.vm.qmp} cannot be reached: Permission denied."
        assert "that curlingd may open the socket" in refusal.remedy


# The VM.


@pytest.mark.qemu
async def test_a_vm_that_cannot_be_migrated(unstable_qemu: Executable) -> None:
    shared = ["-object", "memory-backend-ram,id=shm,size=1M,share=on", "-device", "ivshmem-plain,memdev=shm"]
    async with stage(small(unstable_qemu, extra=shared), automatic=False) as here:
        refusal = await cannot_be_protected(here, ExitCode.PRECHECK)
        assert refusal.error == "MigrationBlocked"
        assert "Migration is disabled when using feature 'peer mode' in device 'ivshmem'" in refusal.text
        assert "Take the device" in refusal.remedy


def drives(tmp_path: Path, form: str = "raw") -> list[str]:
    """A disk of 1 MiB that the guest can write, and one that it can only read."""
    image = tmp_path / f"disk.{form}"
    subprocess.run(["qemu-img", "create", "-q", "-f", form, str(image), "1M"], check=True)
    # Two QEMUs have it open.
    disk = f"file={image},format={form},if=none,file.locking=off"
    options = ["-drive", f"{disk},id=data0", "-device", "virtio-blk-pci,drive=data0"]
    return [*options, "-drive", f"{disk},id=cd0,readonly=on", "-device", "virtio-blk-pci,drive=cd0"]


@pytest.mark.qemu
async def test_a_shared_disk_that_the_guest_can_write(unstable_qemu: Executable, tmp_path: Path) -> None:
    async with stage(
        small(unstable_qemu, extra=drives(tmp_path)), automatic=False, shared_disks=["data0"]
    ) as here:
        refusal = await cannot_be_protected(here, ExitCode.PRECHECK)
        assert refusal.error == "WritableDisk"
        assert refusal.facts["devices"] == ["data0"]
        assert refusal.text.startswith("The guest can write to the shared disk data0: after a failover")
        assert "take it out of shared_disks" in refusal.remedy
        await restart(here.primary, qmp=str(here.vm.qmp), peer=here.backup.link, scratch_disks=["data0"])
        await here.protect(3)


@pytest.mark.qemu
async def test_a_disk_without_a_fitting_copy_on_the_backup(unstable_qemu: Executable, tmp_path: Path) -> None:
    disk, copy = tmp_path / "disk.raw", tmp_path / "copy.raw"
    keys = {"standby": {"replace": {str(disk): str(copy)}}}

    def make(form: str, size: str, *more: str) -> None:
        subprocess.run(["qemu-img", "create", "-q", "-f", form, *more, str(copy), size], check=True)

    async with stage(small(unstable_qemu, extra=drives(tmp_path)), automatic=False, **keys) as here:

        async def is_refused(kind: str, text: str, remedy: str) -> None:
            refusal = await cannot_be_protected(here, ExitCode.PRECHECK)
            assert (refusal.error, refusal.facts["kind"]) == ("PeerRefused", kind)
            assert text in refusal.text
            assert remedy in refusal.remedy

        await is_refused("CopyMissing", f"There is no {copy} on the backup", "'qemu-img create -f raw")
        checks = (await here.primary.call("Doctor", name=VM))["checks"]
        (doctor,) = [check for check in checks if check["check"] == "disk data0"]
        assert doctor["status"] == "failed"
        assert f"There is no {copy} on the backup" in doctor["message"]
        make("raw", "2M")
        await is_refused(
            "CopyWrongSize", "is of 2097152 bytes, and the disk data0", "qemu-img resize --shrink"
        )
        make("qcow2", "1M")
        await is_refused("CopyWrongFormat", "is qcow2 and not raw", "'qemu-img create -f raw")
        make("raw", "1M")
        with locked(copy):
            await is_refused("CopyInUse", "is in use: ", "End what uses it")
        await here.protect(3)


@pytest.mark.qemu
async def test_a_disk_that_qemu_mirrors_already(unstable_qemu: Executable, tmp_path: Path) -> None:
    async with stage(small(unstable_qemu, extra=drives(tmp_path)), automatic=False) as here:
        async with here.operator() as qmp:
            target = {"node-name": "target", "driver": "null-co", "size": 1 << 20}
            await qmp.execute("blockdev-add", target)
            job = {"job-id": "backup0", "device": "data0", "target": "target", "sync": "none"}
            await qmp.execute("blockdev-mirror", job)
        refusal = await cannot_be_protected(here, ExitCode.PRECHECK)
        assert refusal.error == "DiskUnfit"
        assert "a block job of QEMU's is under way (mirror, called backup0)" in refusal.text
        assert "query-block-jobs" in refusal.remedy


@pytest.mark.qemu
async def test_a_disk_of_a_format_that_is_not_replicated(unstable_qemu: Executable, tmp_path: Path) -> None:
    async with stage(small(unstable_qemu, extra=drives(tmp_path, "qed")), automatic=False) as here:
        refusal = await cannot_be_protected(here, ExitCode.PRECHECK)
        assert refusal.error == "DiskUnfit"
        assert "The disk data0 cannot be replicated: its format is qed" in refusal.text


@contextmanager
def locked(image: Path) -> Iterator[None]:
    """Inside the block another process has the image open to write, as a QEMU has it."""
    command = ["qemu-io", "-f", "raw", str(image)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None and process.stdout is not None
        print("length", file=process.stdin, flush=True)
        process.stdout.readline()  # it is open
        yield
        process.stdin.close()


def hello(**changes: Any) -> bytes:
    """A primary's greeting, with something wrong in it."""
    content = {"protocol": PROTOCOL, "software": "0", "host": "stranger", "vm": VM} | changes
    return encode_json(Kind.HELLO, 1, content=content)


# The backup.


@pytest.mark.qemu
async def test_a_backup_that_is_not_there(unstable_qemu: Executable) -> None:
    async with stage(small(unstable_qemu), automatic=False) as here:
        peer = f"{here.beta.address}:1"
        await restart(here.primary, qmp=str(here.vm.qmp), peer=peer)
        refusal = await cannot_be_protected(here, ExitCode.PEER)
        assert refusal.error == "PeerUnreachable"
        assert refusal.text == f"The other host's curlingd at {peer} cannot be reached: Connection refused."
        assert "See that curlingd runs there" in refusal.remedy


@pytest.mark.qemu
async def test_a_backup_across_a_network_without_encryption(unstable_qemu: Executable) -> None:
    async with stage(small(unstable_qemu), automatic=False) as here:
        await here.primary.stop()
        here.primary.settings = {"insecure": False}
        here.primary.configure()
        here.primary.start()
        await here.primary.ready()
        refusal = await cannot_be_protected(here, ExitCode.PRECHECK)
        assert refusal.error == "InsecurePeer"
        assert refusal.facts["address"] == here.beta.address
        assert "insecure = true" in refusal.remedy


@pytest.mark.qemu
@pytest.mark.parametrize(
    ("version", "older"), [(PROTOCOL - 1, "the other host"), (PROTOCOL + 1, "this host")]
)
async def test_a_backup_of_another_protocol(unstable_qemu: Executable, version: int, older: str) -> None:
    async def refuse(stream: trio.SocketStream) -> None:
        await next_frame(stream)
        words = {"kind": "PeerIncompatible", "text": "no", "remedy": "no", "protocol": version}
        await stream.send_all(encode_json(Kind.REFUSE, 0, content=words))

    async with stage(small(unstable_qemu), automatic=False) as here, impostor(here.beta, refuse) as peer:
        await restart(here.primary, qmp=str(here.vm.qmp), peer=peer)
        refusal = await cannot_be_protected(here, ExitCode.PEER)
        assert refusal.error == "PeerIncompatible"
        assert f"{PROTOCOL} here, {version} there" in refusal.text
        assert refusal.remedy == f"Upgrade Curling on {older}."


@pytest.mark.parametrize("version", [PROTOCOL - 1, PROTOCOL + 1, "1", None])
async def test_a_primary_of_another_protocol(nodes: tuple[Node, Node], version: object) -> None:
    node = nodes[1]
    node.configure_vm(VM)
    await start_all(node)
    async with dialled(node) as stream:
        await stream.send_all(
            encode_json(Kind.HELLO, 7, content={"protocol": version, "vm": VM, "host": "x"})
        )
        header, content = await next_frame(stream)
        assert header.kind is Kind.REFUSE
        assert (content["kind"], content["protocol"]) == ("PeerIncompatible", PROTOCOL)
        assert await stream.receive_some() == b""
    shown = await node.show(VM)
    assert (shown["state"], shown["generation"]) == ("idle", 0)


@pytest.mark.qemu
async def test_a_backup_whose_qemu_does_not_know_the_machine(
    unstable_qemu: Executable, system_qemu: Executable
) -> None:
    async with stage(small(unstable_qemu), automatic=False) as here:
        await restart(here.backup, standby={"qemu": system_qemu.path})
        refusal = await cannot_be_protected(here, ExitCode.PRECHECK)
        assert (refusal.error, refusal.facts["kind"]) == ("PeerRefused", "MachineMismatch")
        assert "The two hosts differ in machine type: pc-i440fx-11." in refusal.text
        assert "name a QEMU of the right version as standby.qemu" in refusal.remedy


@pytest.mark.qemu
async def test_a_backup_whose_qemu_is_older(unstable_qemu: Executable, system_qemu: Executable) -> None:
    async with stage(small(unstable_qemu, machine="pc-i440fx-7.2"), automatic=False) as here:
        await restart(here.backup, standby={"qemu": system_qemu.path})
        refusal = await cannot_be_protected(here, ExitCode.PRECHECK)
        assert (refusal.error, refusal.facts["kind"]) == ("PeerRefused", "MachineMismatch")
        ours, theirs = (".".join(map(str, qemu.version)) for qemu in (unstable_qemu, system_qemu))
        assert f"differ in QEMU version: {ours} on the primary, {theirs} on the backup" in refusal.text


@pytest.mark.qemu
async def test_a_backup_with_too_little_memory(unstable_qemu: Executable) -> None:
    # More than a host for tests has; this guest touches hardly any of it.
    backend = ["-object", "memory-backend-ram,id=huge,size=900G,reserve=off"]
    vm = small(unstable_qemu, machine="q35,memory-backend=huge", memory="900G", extra=backend)
    async with stage(vm, automatic=False) as here:
        refusal = await cannot_be_protected(here, ExitCode.PRECHECK)
        assert (refusal.error, refusal.facts["kind"]) == ("PeerRefused", "NotEnoughMemory")
        assert "The backup has too little memory: 90" in refusal.text
        assert "Free or add memory there" in refusal.remedy


@pytest.mark.qemu
async def test_a_standby_that_does_not_start(unstable_qemu: Executable) -> None:
    async with stage(small(unstable_qemu), automatic=False) as here:
        await restart(here.backup, standby={"extra_args": ["-device", "no-such-device"]})
        refusal = await cannot_be_protected(here, ExitCode.PRECHECK)
        assert (refusal.error, refusal.facts["kind"]) == ("PeerRefused", "StandbyFailed")
        assert "it exited with status 1" in refusal.text
        # QEMU's own words.
        assert "'no-such-device' is not a valid device model name" in refusal.text
        assert "standby.extra_args" in refusal.remedy


# Names and states.


async def test_a_vm_that_nobody_knows(nodes: tuple[Node, Node]) -> None:
    nodes[0].configure_vm("web")
    await start_all(nodes[0])
    for command in (["show"], ["protect"], ["unprotect", "--confirm", "wbe"], ["doctor"]):
        refusal = await refused(nodes[0], command[0], "wbe", *command[1:], code=ExitCode.NO_SUCH_VM)
        assert refusal.error == "NoSuchVm"
        assert refusal.text == "This host knows no VM 'wbe'."
        assert refusal.remedy.startswith("Did you mean web?")


async def test_a_name_that_is_short_for_two(nodes: tuple[Node, Node]) -> None:
    for name in ("web-1", "web-2", "db"):
        nodes[0].configure_vm(name)
    await start_all(nodes[0])
    refusal = await refused(nodes[0], "protect", "web", code=ExitCode.NO_SUCH_VM)
    assert refusal.error == "AmbiguousVm"
    assert refusal.text == "'web' is short for more than one VM: web-1 and web-2."
    assert refusal.remedy == "Write more of the name."


@pytest.mark.qemu
async def test_what_cannot_be_done_to_a_protected_vm(unstable_qemu: Executable) -> None:
    async with stage(small(unstable_qemu), automatic=False) as here:
        await here.protect(3)
        again = await refused(here.primary, "protect", VM, code=ExitCode.REFUSED)
        assert again.error == "AlreadyProtected"
        assert again.text == "lab is under protection already (its state is protected)."

        alive = await refused(here.backup, "failover", VM, "--confirm", VM, code=ExitCode.REFUSED)
        assert alive.error == "PrimaryAlive"
        assert alive.facts["silent_ms"] < 1000
        assert alive.text.startswith("The primary of lab is alive: it was heard ")
        assert "curlingctl switch lab" in alive.remedy
        assert "curlingctl failover lab --force" in alive.remedy

        here_not = await refused(here.primary, "failover", VM, "--confirm", VM, code=ExitCode.REFUSED)
        assert here_not.error == "WrongRole"
        assert "on the VM's backup" in here_not.remedy

        shown = await here.more_checkpoints()
        assert (shown["state"], (await here.backup.show(VM))["state"]) == ("protected", "standby")
        assert shown["generation"] == (await here.backup.show(VM))["generation"]
        await here.vm.console.next_round()


@pytest.mark.qemu
async def test_a_failover_of_a_vm_without_a_replica(unstable_qemu: Executable) -> None:
    async with stage(small(unstable_qemu), automatic=False) as here, nothing_changes(here):
        for node in (here.primary, here.backup):
            refusal = await refused(node, "failover", VM, "--confirm", VM, code=ExitCode.REFUSED)
            assert refusal.error == "WrongRole"


# Peers that speak garbage.


@pytest.mark.qemu
async def test_garbage_at_the_port_of_the_link(unstable_qemu: Executable) -> None:
    damaged = bytearray(hello())
    damaged[HEADER_SIZE + 3] ^= 1
    huge = Header(Kind.CHECKPOINT, 1, 1, 1 << 60).encode()
    strangers = {
        "noise": GARBAGE,
        "another protocol": b"GET / HTTP/1.1\r\nHost: beta\r\nAccept: */*\r\n\r\n",
        "a damaged frame": bytes(damaged),
        "a frame without end": huge,
        "no greeting": encode_json(Kind.HEARTBEAT, 1),
        "no VM": hello(vm=["lab"]),
        "another VM": hello(vm="lba"),
        "no JSON": b"".join([Header(Kind.HELLO, 1, 0, 9).encode(), GARBAGE[:9], bytes(TRAILER_SIZE)]),
    }
    async with stage(small(unstable_qemu), automatic=False) as here:
        await here.protect(3)
        before = await here.primary.show(VM)
        for node in (here.primary, here.backup):
            for sent in strangers.values():
                async with dialled(node) as stream:
                    await stream.send_all(sent)
                    answer = await everything(stream)
                assert answer == b"" or Header.decode(answer[:HEADER_SIZE], max_raw=0).kind is Kind.REFUSE
        shown = await here.more_checkpoints()
        assert (shown["state"], (await here.backup.show(VM))["state"]) == ("protected", "standby")
        # The very session goes on.
        assert shown["statistics"]["committed"] > before["statistics"]["committed"] > 0
        assert shown["generation"] == before["generation"]


@pytest.mark.qemu
@pytest.mark.parametrize("after", ["HELLO", "DEFINE", "BULK"])
async def test_a_backup_that_speaks_garbage(unstable_qemu: Executable, after: str) -> None:
    async def babble(stream: trio.SocketStream) -> None:
        await next_frame(stream)
        if after != "HELLO":
            await stream.send_all(encode_json(Kind.WELCOME, 0, content={"host": "beta"}))
            await next_frame(stream)
        if after == "BULK":
            await stream.send_all(encode_json(Kind.PREPARED, 0, content={"alike": []}))
            await stream.receive_some(1)
        await stream.send_all(GARBAGE)
        await everything(stream)

    async with stage(small(unstable_qemu), automatic=False) as here, impostor(here.beta, babble) as peer:
        await restart(here.primary, qmp=str(here.vm.qmp), peer=peer)
        if after != "BULK":
            refusal = await cannot_be_protected(here, ExitCode.PEER)
        else:  # the pass has begun: the guest may have been stopped for a moment
            refusal = await refused(here.primary, "protect", VM, code=ExitCode.PEER)
            assert (await here.primary.show(VM))["state"] == "idle"
            async with here.operator() as operator:
                answer = await operator.execute("query-migrate-capabilities")
                on = {entry["capability"] for entry in answer if entry["state"]}
                assert not on & {"x-colo", "background-snapshot"}
                assert await operator.status() == "running"
            await here.vm.console.next_round()
        assert refusal.error == "FrameError"
        assert "this is not a Curling link" in refusal.text
        assert "See that peer names the other host's curlingd" in refusal.remedy


# curlingctl itself.


async def test_curlingctl_without_a_daemon(nodes: tuple[Node, Node]) -> None:
    node = nodes[0]
    refusal = await refused(node, "list", code=ExitCode.NO_DAEMON)
    assert refusal.text == f"No curlingd answers at {node.socket}: No such file or directory."
    await start_all(node)
    node.kill()
    assert node.process is not None
    node.process.wait()
    refusal = await refused(node, "list", code=ExitCode.NO_DAEMON)
    assert refusal.error == "DaemonUnreachable"
    assert refusal.text == f"No curlingd answers at {node.socket}: Connection refused."
    assert "systemctl start curlingd" in refusal.remedy


@pytest.mark.parametrize("reachable", [False, True])
async def test_curlingctl_without_permission(nodes: tuple[Node, Node], reachable: bool) -> None:
    node = nodes[0]
    node.configure_vm(VM)
    await start_all(node)
    open_to_all(node.directory)
    if reachable:  # then the daemon itself says no
        node.socket.chmod(0o666)
    for command in (["list"], ["show", VM], ["failover", VM, "--confirm", VM]):
        argv = [*as_nobody("curling_fd.ctl.main"), "--socket", str(node.socket), *command]
        told, shown = [
            await trio.run_process([*argv, *more], capture_stdout=True, capture_stderr=True, check=False)
            for more in ([], ["--json"])
        ]
        refusal = _refusal(_text(told), _text(shown), ExitCode.NOT_PERMITTED)
        assert refusal.error == "NotPermitted"
        assert refusal.text.startswith(f"User {NOBODY} lacks the right for")
        assert "Be root, or have root add you to the group" in refusal.remedy
    assert (await node.show(VM))["state"] == "idle"


def _text(done: subprocess.CompletedProcess[bytes]) -> subprocess.CompletedProcess[str]:
    return subprocess.CompletedProcess(done.args, done.returncode, done.stdout.decode(), done.stderr.decode())


# Strangers and other users.


def as_nobody(module: str) -> list[str]:
    """The start of a command line that runs the program in `module` with no rights at all.

    It gives them up itself, for nobody may not be allowed where Python is installed.
    """
    give_up = f"os.setgroups([]); os.setresgid(*[{NOBODY}] * 3); os.setresuid(*[{NOBODY}] * 3)"
    return [sys.executable, "-c", f"import os, sys; from {module} import main; {give_up}; sys.exit(main())"]


def open_to_all(directory: Path) -> None:
    """Let everybody go through the lab's folders to `directory`."""
    for folder in (directory, *directory.parents[:2]):
        folder.chmod(0o755)


def start_as_nobody(node: Node) -> None:
    """Start the daemon of `node` as a user who may do nothing but keep its own files."""
    assert node.host is not None
    open_to_all(node.directory)
    for path in (node.directory, *node.directory.rglob("*")):
        shutil.chown(path, NOBODY, NOBODY)
    argv = [*as_nobody("curling_fd.service.daemon"), "--config", str(node.config)]
    with node.log.open("ab") as log:
        node.process = node.host.popen(argv, stdin=subprocess.DEVNULL, stdout=log, stderr=log)


@asynccontextmanager
async def impostor(host: Host, serve: Callable[[trio.SocketStream], Awaitable[None]]) -> AsyncIterator[str]:
    """Something on `host` that is no curlingd; yields its address."""
    with host.entered():
        listening = socket.create_server((host.address, 0))

    async def patiently(stream: trio.SocketStream) -> None:
        async with stream:
            try:
                await serve(stream)
            except (trio.BrokenResourceError, EOFError):
                pass  # it has heard enough

    address, port = listening.getsockname()
    listener = trio.SocketListener(trio.socket.from_stdlib_socket(listening))
    async with trio.open_nursery() as nursery:
        nursery.start_soon(trio.serve_listeners, patiently, [listener])
        yield f"{address}:{port}"
        nursery.cancel_scope.cancel()


@asynccontextmanager
async def dialled(node: Node) -> AsyncIterator[trio.SocketStream]:
    """A connection to the link of `node`, from its own host."""
    assert node.host is not None
    with node.host.entered():
        sock = socket.create_connection((node.address, node.port), timeout=PATIENCE)
    sock.setblocking(False)
    async with trio.SocketStream(trio.socket.from_stdlib_socket(sock)) as stream:
        yield stream


async def everything(stream: trio.SocketStream) -> bytes:
    """All that comes until the other side closes."""
    received = b""
    with trio.fail_after(PATIENCE):
        try:
            async for piece in stream:
                received += piece
        except trio.BrokenResourceError:
            pass  # it closed without reading all we said
    return received


async def next_frame(stream: trio.SocketStream) -> tuple[Header, dict[str, Any]]:
    """The next frame, of a kind that has JSON in it."""
    with trio.fail_after(SYNC):
        header = Header.decode(await exactly(stream, HEADER_SIZE), max_raw=0)
        content = decode_json(await exactly(stream, header.length))
        await exactly(stream, TRAILER_SIZE)
    return header, content


async def exactly(stream: trio.SocketStream, length: int) -> bytes:
    received = b""
    while len(received) < length:
        piece = await stream.receive_some(length - len(received))
        if not piece:
            raise EOFError
        received += piece
    return received
