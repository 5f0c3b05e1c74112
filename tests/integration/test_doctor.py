"""`curlingctl doctor` on both hosts: which of them lacks what, and what to do, before a VM is protected."""

from __future__ import annotations

import json
import os
import socket
import subprocess
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import trio

from curling_fd.ctl.exit_codes import ExitCode
from curling_fd.link.frames import PROTOCOL, Kind, encode_json
from tests.integration.stage import VM, stage
from tests.integration.test_bad_input import dialled, impostor, next_frame, restart
from tests.lab.cluster import Node, cluster, start_all
from tests.lab.guests import BootSectorGuest
from tests.lab.hosts import Host
from tests.lab.roots import Executable
from tests.lab.vm import LabVm

YEARS = 3 * 365 * 86400

#: A daemon that starts with this as its sitecustomize.py has its clock wrong.
WRONG_CLOCK = f"""
import time
_right, _right_ns = time.time, time.time_ns
time.time = lambda: _right() + {YEARS}
time.time_ns = lambda: _right_ns() + {YEARS} * 10**9
"""


async def doctor(node: Node, *names: str) -> tuple[int, dict[str, dict[str, Any]]]:
    """The exit code of doctor on `node`, and its findings by check; every one that is not ok has a remedy."""
    done = await trio.to_thread.run_sync(node.ctl, "--json", "doctor", *names)
    checks = json.loads(done.stdout)["checks"]
    assert all(bool(check["remedy"]) == (check["status"] != "ok") for check in checks), checks
    failed = any(check["status"] == "failed" for check in checks)
    assert done.returncode == (ExitCode.FAILED if failed else ExitCode.OK)
    found = {check["check"]: check for check in checks}
    assert len(found) == len(checks), "each is told once"
    return done.returncode, found


@asynccontextmanager
async def two_nodes(hosts: tuple[Host, Host], **keys: Any) -> AsyncIterator[tuple[Node, Node]]:
    """Daemons that know a VM which does not run, not started yet."""
    async with cluster(hosts) as (alpha, beta):
        alpha.configure_vm(VM, peer=beta.link, **keys)
        beta.configure_vm(VM, peer=alpha.link, **keys)
        yield alpha, beta


@contextmanager
def full(directory: Path) -> Iterator[None]:
    """Make `directory` a file system of its own, with nothing left on it."""
    directory.mkdir(parents=True, exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(directory)], check=True)
    try:
        with (directory / "filler").open("wb", buffering=0) as filler, suppress(OSError):
            while True:
                filler.write(bytes(4096))
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(directory)], check=True)


async def test_two_hosts_that_are_well_say_so_of_each_other(
    host_pair: tuple[Host, Host], tmp_path: Path
) -> None:
    keys = {"arbiter": "file", "arbiter_directory": str(tmp_path)}
    async with two_nodes(host_pair, **keys) as nodes:
        await start_all(*nodes)
        for node, other in (nodes, nodes[::-1]):
            code, found = await doctor(node)
            assert code == ExitCode.OK
            assert found["peer"]["message"] == f"curlingd on {other.name} answers at {other.link}"
            assert found["clocks"]["status"] == "ok"
            assert found["qemu of both"]["status"] == "ok"
        assert not list(tmp_path.iterdir()), "nothing is left in the arbiter's directory"


@pytest.mark.parametrize("which", ["state", "run"])
async def test_a_full_file_system_is_named_on_both_hosts(host_pair: tuple[Host, Host], which: str) -> None:
    name = {"state": "state directory", "run": "runtime directory"}[which]
    async with two_nodes(host_pair) as (alpha, beta):
        with full(alpha.directory / which):
            await start_all(alpha, beta)
            code, found = await doctor(alpha)
            assert code == ExitCode.FAILED
            assert found[name]["message"].startswith(f"{alpha.directory / which} is full: 0 B and ")
            code, found = await doctor(beta)
            assert code == ExitCode.FAILED
            assert found[name]["status"] == "ok"
            assert found[f"{name} on {alpha.name}"]["message"].startswith(
                f"{alpha.directory / which} is full: "
            )


async def test_a_clock_that_is_years_off_is_named_on_both_hosts(
    host_pair: tuple[Host, Host], tmp_path: Path
) -> None:
    (tmp_path / "sitecustomize.py").write_text(WRONG_CLOCK)
    async with two_nodes(host_pair) as (alpha, beta):
        beta.environment = {"PYTHONPATH": f"{tmp_path}:{os.getcwd()}"}
        await start_all(alpha, beta)
        code, found = await doctor(alpha)
        assert code == ExitCode.FAILED
        assert found["clocks"]["message"].startswith(
            f"the clock of {beta.name} is 3 years ahead of this host's"
        )
        code, found = await doctor(beta)
        assert code == ExitCode.FAILED
        assert found["clocks"]["message"].startswith(
            f"the clock of {alpha.name} is 3 years behind this host's"
        )
        assert "timedatectl" in found["clocks"]["remedy"]


async def test_a_port_that_another_program_has_is_named_on_both_hosts(host_pair: tuple[Host, Host]) -> None:
    async with two_nodes(host_pair) as (alpha, beta):
        with host_pair[1].entered():
            other = socket.create_server((beta.address, beta.port))
        with other:
            beta.start()
            assert beta.process is not None
            # Not 78: systemd is to try again, for the port may be free then.
            assert await trio.to_thread.run_sync(beta.process.wait) == 1
            said = f"This curlingd cannot listen on {beta.link} for other hosts: Address already in use."
            assert f"curlingd: {said}\n" in beta.log_text()
            assert "'ss -ltnp' shows it" in beta.log_text()
            await start_all(alpha)
            code, found = await doctor(alpha)
            assert code == ExitCode.FAILED
            assert found["peer"]["message"].startswith(f"what answers at {beta.link} is no curlingd")


@pytest.mark.parametrize("says", [b"", b"SSH-2.0-OpenSSH_9.2p1 Debian-2+deb12u7\r\n", os.urandom(4096), None])
async def test_what_answers_and_is_no_curlingd_is_named(
    host_pair: tuple[Host, Host], says: bytes | None
) -> None:
    async def answer(stream: trio.SocketStream) -> None:
        if says is not None:  # else it takes the connection and is silent
            await stream.send_all(says)
            await stream.receive_some()
            return
        await trio.sleep_forever()

    async with two_nodes(host_pair) as (alpha, _), impostor(host_pair[1], answer) as address:
        alpha.configure_vm(VM, peer=address)
        await start_all(alpha)
        code, found = await doctor(alpha)
        assert code == ExitCode.FAILED
        assert found["peer"]["message"].startswith(
            f"what answers at {address} is no curlingd, or is broken: "
        )
        assert "'ss -ltnp'" in found["peer"]["remedy"]


async def test_a_peer_that_does_not_know_the_vm_is_named(host_pair: tuple[Host, Host]) -> None:
    async with two_nodes(host_pair) as (alpha, beta):
        (beta.config.parent / "vms" / f"{VM}.toml").unlink()
        await start_all(alpha, beta)
        code, found = await doctor(alpha)
        assert code == ExitCode.FAILED
        assert f"This host knows no VM '{VM}'" in found["peer"]["message"]


async def test_hosts_that_ask_other_arbiters_are_named(host_pair: tuple[Host, Host], tmp_path: Path) -> None:
    async with two_nodes(host_pair) as (alpha, beta):
        for node in (alpha, beta):
            directory = tmp_path / node.name
            directory.mkdir()
            other = beta if node is alpha else alpha
            node.configure_vm(VM, peer=other.link, arbiter="file", arbiter_directory=str(directory))
        await start_all(alpha, beta)
        done = await trio.to_thread.run_sync(alpha.ctl, "--json", "doctor")
        messages = [
            check["message"] for check in json.loads(done.stdout)["checks"] if check["status"] == "failed"
        ]
        assert messages == [f"{beta.name} does not see what this host writes to arbiter_directory"]


@pytest.mark.qemu
async def test_a_qemu_that_is_older_on_the_other_host_is_named_on_both(
    unstable_qemu: Executable, system_qemu: Executable
) -> None:
    vm = LabVm(qemu=unstable_qemu, guest=BootSectorGuest())
    async with stage(vm, automatic=False) as here:
        older = {"qemu": str(system_qemu.path)}
        await restart(here.backup, peer=here.primary.link, standby=older)
        code, found = await doctor(here.primary)
        assert code == ExitCode.FAILED
        assert (
            f"{system_qemu.path} on {here.backup.name} does not know the machine type"
            in found["qemu of both"]["message"]
        )
        code, found = await doctor(here.backup)
        assert code == ExitCode.FAILED
        assert "the backup's must not be older than the primary's" in found["qemu of both"]["message"]


@pytest.mark.qemu
async def test_doctor_sees_a_protected_vm_from_both_hosts_and_disturbs_nothing(
    unstable_qemu: Executable,
) -> None:
    vm = LabVm(qemu=unstable_qemu, guest=BootSectorGuest())
    async with stage(vm, automatic=False, standby={"qemu": str(unstable_qemu.path)}) as here:
        for node in (here.primary, here.backup):  # before, for both
            code, found = await doctor(node)
            assert code == ExitCode.OK, found
            assert found["qemu of both"]["status"] == "ok"
        await here.protect(3)
        for node in (here.primary, here.backup):
            code, found = await doctor(node)
            assert code == ExitCode.OK, found
            assert found["qemu of both"]["status"] == "ok"
        await here.more_checkpoints()
        assert here.happened(here.primary, "committed") == 1


async def test_a_probe_that_is_garbage_harms_nobody(host_pair: tuple[Host, Host]) -> None:
    async with two_nodes(host_pair) as (alpha, _):
        await start_all(alpha)
        asked: dict[str, Any] = {"protocol": PROTOCOL, "vm": VM, "host": "x"}
        wrong: dict[str, Any]
        for wrong in ({"binary": 7}, {"machine": ["pc"]}, {"token": {}}, {"binary": "x\0y"}, {"vm": None}):
            async with dialled(alpha) as stream:
                await stream.send_all(encode_json(Kind.PROBE, 0, content=asked | wrong))
                if "vm" in wrong:
                    assert (await next_frame(stream))[0].kind is Kind.REFUSE
                else:
                    assert await stream.receive_some() == b""
        for odd in (
            {"binary": "/bin/sh"},
            {"binary": "../../etc/passwd"},
            {"machine": "x" * 10_000},
            {"token": "../x"},
        ):
            async with dialled(alpha) as stream:
                await stream.send_all(encode_json(Kind.PROBE, 0, content=asked | odd))
                header, content = await next_frame(stream)
                assert header.kind is Kind.FACTS
                assert content["problem"] is None or "is no name of a QEMU" in content["problem"]
        assert (await alpha.show(VM))["state"] == "idle"
