"""Two lab hosts, a client and a guest, put together as README.md says.

    eth0   192.0.2.1 (alpha) - 192.0.2.2 (beta)                 ports link.alpha, link.beta
    br0    198.51.100.1, .2, the guest's .5, the client's .100  ports front.alpha, front.beta, front.client
    /srv/arbiter   a folder of this machine, which outlives both hosts

The hosts are there for as long as a `with` block runs; lines to their agents belong to a Trio run and are
opened with `Lab.connected`, as often as one likes. So one pair of hosts serves many tests.
"""

from __future__ import annotations

import contextlib
import fcntl
import itertools
import os
import shlex
import shutil
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterable, Iterator, Sequence
from contextlib import aclosing, asynccontextmanager, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import trio
from attrs import define

from tests.lab import hosts as namespaces
from tests.lab.debs import run

from . import readme
from .cables import Cables, switch
from .calls import call, follow
from .control import Agent
from .host import Host
from .image import PLAIN, Variant, image
from .payload import ROOT, payload
from .steps import (
    GUEST_UNIT,
    PIP,
    USUAL,
    VM,
    Machine,
    configuration,
    guest_command,
    installed,
    tap_command,
)
from .tidy import in_use, tidy
from .timeline import Clocks, Timeline

CLIENT_ADDRESS = "198.51.100.100"

#: In the networks of the guest's first and second card, which share the wires.
CLIENT_ADDRESSES = (f"{CLIENT_ADDRESS}/24", "fd00:198::100/64", "203.0.113.100/24", "fd00:203::100/64")
RECORDS = ROOT / "build" / "vm"
PORTS = ("link.alpha", "link.beta", "front.alpha", "front.beta")
CLIENT_PORT = "front.client"

Say = Callable[[str], None]
_serial = itertools.count()


@define(eq=False)
class Lab:
    """The pair; made by `lab`. `timeline` is of the scenario that runs, `machine` what runs as the VM."""

    alpha: Host
    beta: Host
    client: namespaces.Host
    cables: Cables
    clocks: Clocks
    timeline: Timeline
    sockets: Path
    shared: Path
    records: Path
    say: Say
    machine: Machine = USUAL
    _nursery: trio.Nursery | None = None

    @property
    def hosts(self) -> tuple[Host, Host]:
        return self.alpha, self.beta

    def other(self, host: Host) -> Host:
        return self.beta if host is self.alpha else self.alpha

    @asynccontextmanager
    async def connected(self) -> AsyncIterator[None]:
        """Lines to all hosts that have power, for the length of a block."""
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            await self.on_each(self._connect, [host for host in self.hosts if host.pid])
            try:
                yield
            finally:
                self._nursery = None
                nursery.cancel_scope.cancel()

    async def power_on(self, *hosts: Host) -> None:
        """Start hosts and wait until they have booted."""
        await self.on_each(self._boot, hosts)

    async def lose_power(self, host: Host) -> None:
        """The fault: see `Host.lose_power`."""
        self.timeline.note("test", f"{host.name} is about to lose its power")
        self.timeline.note("test", host.lose_power())
        await host.agent.lost.wait()

    async def on_each(
        self, action: Callable[[Host], Awaitable[Any]], hosts: Iterable[Host] | None = None
    ) -> None:
        """Do the same on several hosts (both by default) at once."""
        async with trio.open_nursery() as nursery:
            for host in self.hosts if hosts is None else hosts:
                nursery.start_soon(action, host)

    # README, step by step.

    async def set_up(self) -> None:
        """Boot both hosts, configure them as README says, and make the guest known to them."""
        await self.power_on(*self.hosts)
        await self.on_each(self.configure)
        self.say("both hosts are configured")

    async def configure(self, host: Host) -> None:
        """README's second step: files and firewall, and what the slowness of a lab asks for in a drop-in."""
        for path, text in configuration(0 if host is self.alpha else 1).items():
            await host.agent.write(path, text)
        await host.agent.write("/etc/systemd/system/lab-guest.service", GUEST_UNIT)
        await self._write_guest(host)
        await host.agent.run("systemctl daemon-reload")
        await self.script(host, readme.block("sh", "nft add table"))

    async def _write_guest(self, host: Host) -> None:
        command = f"#!/bin/sh -e\n{guest_command(self.machine)}"
        await host.agent.write("/usr/local/sbin/start-guest", command, mode=0o755)

    async def enable(self, host: Host) -> None:
        """README's last line of the second step; where it has been done, only what runs after a boot."""
        enabled = await host.agent.run("systemctl is-enabled curlingd.service", check=False)
        if enabled.status:
            await self.script(host, readme.block("sh", "systemctl enable"))
        else:
            await host.agent.run("systemctl start curlingd.socket curlingd.service")

    async def script(self, host: Host, text: str, cwd: str = "/root") -> str:
        """Run a shell script in a host as README's reader would, up to the first failure; its output."""
        env = dict(word.split("=", 1) for word in PIP)
        started = self.clocks.now()
        done = await host.agent.run(["/bin/bash", "-exc", text], env=env, cwd=cwd, within=600)
        took = f"(took {self.clocks.now() - started:.1f} s)"
        self.timeline.note("test", f"{host.name}# {text.strip()}\n{took}\n{done.stdout}".rstrip())
        return done.stdout

    # The guest.

    async def start_guest(self, host: Host) -> None:
        """Start the guest and wait until its program runs."""
        console = host.guest_console
        seen = len(console.lines())
        for tap in self.machine.taps:
            if (await host.agent.run(f"ip link show {tap}", check=False)).status:
                await self.script(host, tap_command(tap))
        await host.agent.run("systemctl start lab-guest")
        await console.wait_line("curling ready", start=seen, within=180)
        self.timeline.note("test", f"the guest runs on {host.name}")

    # Curling.

    async def ctl(self, host: Host, *arguments: str, check: bool = True, within: float = 300) -> str:
        """Run curlingctl in a host; what it printed."""
        command = ["curlingctl", *arguments]
        done = await host.agent.run(command, check=check, within=within)
        said = f"{done.stdout}{done.stderr}".strip()
        self.timeline.note("test", f"{host.name}# {shlex.join(command)}  -> {done.status}\n{said}".rstrip())
        return done.stdout

    async def show(self, host: Host, vm: str = VM) -> dict[str, Any]:
        """What curlingd says of a VM."""
        return dict((await call(host.agent, "Show", {"name": vm}))["vm"])

    async def committed(self, host: Host, count: int, *, within: float = 180) -> dict[str, Any]:
        """Wait until the running session has committed `count` checkpoints; what `show` says then."""
        with trio.move_on_after(within):
            async with aclosing(self._watch(host)) as shown:
                async for vm in shown:
                    if vm["state"] in ("protected", "standby") and vm["statistics"]["committed"] >= count:
                        return vm
        raise TimeoutError(
            f"{VM} on {host.name} has not committed {count} checkpoints: {await self.show(host)}"
        )

    async def wait_state(self, host: Host, *states: str, within: float = 120) -> dict[str, Any]:
        """Wait until the VM is in one of `states` on a host; what `show` says then."""
        seen = ""
        with trio.move_on_after(within):
            async with aclosing(self._watch(host)) as shown:
                async for vm in shown:
                    if vm["state"] != seen:
                        seen = vm["state"]
                        self.timeline.note("test", f"{VM} on {host.name} is {seen}: {vm['reason']}")
                    if seen in states:
                        return vm
        raise TimeoutError(f"{VM} on {host.name} is {seen}, not {' or '.join(states)}, after {within} s")

    async def _watch(self, host: Host) -> AsyncGenerator[dict[str, Any], None]:
        """What curlingd says of the VM, five times a second, over restarts of curlingd."""
        while True:
            async with aclosing(follow(host.agent, "Watch", {"name": VM, "interval_ms": 200})) as answers:
                async for answer in answers:
                    (vm,) = answer["vms"]
                    yield vm

    # What a test starts from. Each does only what is not so already.

    async def ready(self) -> None:
        """Both hosts on, their daemons running, and a guest on alpha that runs unprotected, or protected."""
        if self.machine != USUAL:
            return await self.afresh()
        await self.power_on(*[host for host in self.hosts if host.pid is None])
        await self.on_each(self.enable)
        if (await self.show(self.alpha))["role"] != "primary":
            active = await self.alpha.agent.run("systemctl is-active lab-guest", check=False)
            if active.status:
                await self.start_guest(self.alpha)

    async def protected(self, machine: Machine = USUAL) -> None:
        """The guest runs on alpha, protected to beta; made anew if it is not so."""
        if machine == self.machine and all(host.pid for host in self.hosts):
            states = [(await self.show(host))["state"] for host in self.hosts]
            if states == ["protected", "standby"]:
                return
            guest = await self.alpha.agent.run("systemctl is-active lab-guest", check=False)
            if states == ["idle", "idle"] and guest.status == 0:
                return await self._protect()
        await self.afresh(machine)
        await self._protect()

    async def _protect(self) -> None:
        self.say(f"protect {VM}")
        await call(self.alpha.agent, "Protect", {"name": VM})

    async def afresh(self, machine: Machine = USUAL) -> None:
        """Whatever was: nothing protected, nothing remembered, a new guest on alpha."""
        self.say("a new guest on alpha")
        taps = sorted({*self.machine.taps, *machine.taps})
        await self.power_on(*[host for host in self.hosts if host.pid is None])
        await self.cables.heal(*PORTS, CLIENT_PORT)
        await self.on_each(partial(self._forget, taps))
        if machine != self.machine:
            self.machine = machine
            await self.on_each(self._write_guest)
        for path in self.shared.iterdir():
            path.unlink()
        await self.on_each(self.enable)
        await self.start_guest(self.alpha)

    async def _forget(self, taps: Sequence[str], host: Host) -> None:
        delete = "".join(f"ip link delete {tap}; " for tap in taps)
        await host.agent.run(
            f"systemctl stop curlingd.service lab-guest; pkill -KILL qemu-system; {delete}"
            "while pgrep qemu-system >/dev/null; do sleep 0.1; done; "
            "rm -rf /var/lib/curling/* /run/curling/* /run/vm; systemctl reset-failed; "
            "systemctl restart curlingd.socket",
        )

    # One host.

    async def _boot(self, host: Host) -> None:
        self.say(f"{host.name} boots")
        await host.power_on()
        self.timeline.note(
            "test", f"{host.name} has power: process {host.pid}, boot {host.boots} of this lab"
        )
        await self._connect(host)
        await host.agent.run("systemctl is-system-running --wait", check=False, within=300)
        failed = (await host.agent.run("systemctl --failed --plain --no-legend")).stdout
        self.timeline.note("test", f"{host.name} has booted; failed units: {failed.strip() or 'none'}")
        self.say(f"{host.name} has booted")

    async def _connect(self, host: Host) -> None:
        assert self._nursery is not None, "use `connected`"
        await self._nursery.start(self._hold, host)

    async def _hold(self, host: Host, task_status: trio.TaskStatus[Agent]) -> None:
        async with host.connected() as agent:
            self.clocks.learn(agent.greeting)
            task_status.started(agent)
            await agent.lost.wait()
            if (end := host.own_end()) is not None:
                self.say(end)
                self.timeline.note("test", end)

    # Scenarios.

    @contextmanager
    def scenario(self, name: str) -> Iterator[Timeline]:
        """A timeline of its own for the length of a block, below build/vm/NAME."""
        before, self.timeline = self.timeline, Timeline(RECORDS / name, self.clocks)
        marks = {path: path.stat().st_size for path in self._logs() if path.exists()}
        try:
            yield self.timeline
        except BaseException as error:
            self.timeline.note("test", f"FAILED: {type(error).__name__}: {error}")
            raise
        finally:
            self._collect(marks)
            self.timeline.finish()
            self.timeline = before

    def _logs(self) -> list[Path]:
        kinds = ("console.log", "journal.json", "guest.log")
        return [self.records / f"{host.name}.{kind}" for host in self.hosts for kind in kinds]

    def _collect(self, marks: dict[Path, int]) -> None:
        """Copy what came into the logs since `marks`, and tell the timeline of it."""
        for path in self._logs():
            data = path.read_bytes() if path.exists() else b""
            start, host = marks.get(path, 0), path.name.partition(".")[0]
            if self.timeline.folder != self.records:
                (self.timeline.folder / path.name).write_bytes(data[start:])
            if path.name.endswith("journal.json"):
                self.timeline.add_journal(host, data[start:])
            elif path.name.endswith("guest.log"):
                self.timeline.add_console(host, data, start)


@contextmanager
def lab(
    name: str = "lab", variant: Variant = PLAIN, say: Say = print, *, install: bool = True
) -> Iterator[Lab]:
    """A lab without power, with new disks. At its end nothing of it is left but build/vm/NAME.

    Args:
        name: of the folder for what is recorded.
        variant: which kind of hosts.
        say: told what is being done.
        install: Curling is on the disks, as README's first step leaves it.
    """
    with contextlib.ExitStack() as stack:
        stack.enter_context(_alone(name, say))
        yield stack.enter_context(_lab(name, variant, say, install))


@contextmanager
def _alone(name: str, say: Say) -> Iterator[None]:
    """Wait for another lab that records under the same name."""
    RECORDS.mkdir(parents=True, exist_ok=True)
    with (RECORDS / f".{name}.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say(f"another lab {name!r} is there; waiting for its end")
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


@contextmanager
def _lab(name: str, variant: Variant, say: Say, install: bool) -> Iterator[Lab]:
    namespaces.remove_leftovers()
    say("the image of the hosts, the wheels and the guest (minutes if they have to be made)")
    second = payload()
    booted = image(variant, installed(second) if install else None)
    records = RECORDS / name
    shutil.rmtree(records, ignore_errors=True)
    sockets = namespaces.scratch_folder()
    clocks = Clocks()
    with contextlib.ExitStack() as stack:
        stack.callback(shutil.rmtree, sockets, ignore_errors=True)
        stack.enter_context(in_use(booted.disk.parent, second.disk.parent))
        tidy()
        timeline = Timeline(records, clocks)
        shared = sockets / "arbiter"
        shared.mkdir()
        client = stack.enter_context(_client(sockets))
        stack.enter_context(switch(sockets, records, [*PORTS, f"{CLIENT_PORT}={client.namespace}"]))
        with client.entered():
            run(["ip", "link", "set", "lo", "up"])
            for address in CLIENT_ADDRESSES:
                nodad = ["nodad"] if ":" in address else []
                run(["ip", "address", "add", address, "dev", "eth0", *nodad])
            run(["ip", "link", "set", "eth0", "up"])
        pair = [
            Host(name, number, booted, second.disk, sockets, records, shared)
            for number, name in enumerate(("alpha", "beta"), 1)
        ]
        for host in pair:
            host.make_disk()
            stack.callback(host.close)
        alpha, beta = pair
        made = Lab(
            alpha=alpha,
            beta=beta,
            client=client,
            cables=Cables(sockets / "control.sock", lambda: made.timeline),
            clocks=clocks,
            timeline=timeline,
            sockets=sockets,
            shared=shared,
            records=records,
            say=say,
        )
        stack.callback(_finish, made)
        yield made


def _finish(made: Lab) -> None:
    made._collect({})
    made.timeline.finish()


@contextmanager
def _client(folder: Path) -> Iterator[namespaces.Host]:
    namespace = f"curling-{os.getpid()}-{next(_serial)}-client"
    host = namespaces.Host("client", namespace, CLIENT_ADDRESS, folder / "client")
    host.directory.mkdir()
    run(["ip", "netns", "add", namespace])
    try:
        yield host
    finally:
        host.kill_all()
        run(["ip", "netns", "delete", namespace])
