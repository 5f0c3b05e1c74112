"""`make demo`: a VM loses its host and goes on.

Two hosts made of network namespaces, a curlingd on each, and a guest that keeps rewriting its memory and
verifies every page of it before each round. The demo protects the guest, shows it running, then cuts the
primary host's cable and kills everything on it, as a loss of power would, and watches the guest go on at the
backup.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import trio
from attrs import asdict, frozen

from .cluster import Node, cluster, start_all
from .console import Console, Round
from .guests import LinuxGuest
from .hosts import Host, termination_as_interrupt, two_hosts
from .roots import Executable, qemu_binary
from .vm import LabVm

VM = "demo"
RESULT = Path("build/demo.json")

#: Seconds of protected running that are shown, checkpoints at least that are waited for, and rounds that the
#: guest must make after it has lost its host.
SHOWN = 5.0
CHECKPOINTS = 10
ROUNDS_AFTER = 50


@frozen
class Result:
    """What the demo saw; the keys of build/demo.json."""

    engine: str
    accelerator: str
    qemu: str
    checkpoints: int
    checkpoints_per_s: float
    stop_ms_p50: float | None
    stop_ms_p99: float | None
    pages_p50: int
    detection_ms: float | None
    failover_ms: float | None
    guest_rounds_before: int
    guest_rounds_after: int
    guest_corrupt_pages: int
    ok: bool


def say(text: str) -> None:
    print(text, flush=True)


async def demo(qemu: Executable) -> Result:
    """Run the demo with `qemu` and return what was seen."""
    say(f"Two hosts, alpha and beta, joined by a cable. {qemu.banner}")
    with two_hosts() as hosts:
        alpha, beta = hosts
        async with cluster(hosts) as (primary, backup):
            say("A guest boots on alpha: Linux, and a program that rewrites its memory and verifies it all.")
            async with LabVm(guest=LinuxGuest(pages=2048, dirty=200), qemu=qemu, host=alpha, name=VM) as vm:
                configure(vm, primary, backup, alpha)
                await start_all(primary, backup)
                await vm.wait_round(10)
                await protect(primary)
                before = await show_live(vm, primary)
                shown = await primary.show(VM)
                await lose(alpha)
                return await go_on(before, vm, shown, backup, beta, qemu)


def configure(vm: LabVm, primary: Node, backup: Node, alpha: Host) -> None:
    shared = alpha.directory.parent / "arbiter"
    shared.mkdir()
    both: dict[str, Any] = {"arbiter": "file", "arbiter_directory": str(shared), "longest_epoch": "100ms"}
    primary.configure_vm(VM, qmp=str(vm.qmp), peer=backup.link, **both)
    backup.configure_vm(VM, peer=primary.link, **both)


async def protect(primary: Node) -> None:
    say("alpha$ curlingctl protect demo")
    done = await trio.to_thread.run_sync(primary.ctl, "protect", VM)
    print(done.stdout, end="", flush=True)
    if done.returncode:
        raise RuntimeError(f"protect failed:\n{done.stderr}\n{primary.log_text()}")
    vm = await primary.wait_committed(VM, CHECKPOINTS)
    say(f"Engine {vm['engine']}: {vm['engine_reason']}.")


async def show_live(vm: LabVm, primary: Node) -> Round:
    """Show a few seconds of protected life."""
    end = trio.current_time() + SHOWN
    while trio.current_time() < end:
        await trio.sleep(1)
        statistics, last = (await primary.show(VM))["statistics"], vm.rounds()[-1]
        say(
            f"  guest round {last.number:6}, corrupt {last.corrupt}"
            f"   checkpoint {statistics['committed']:5}, {statistics['checkpoints_per_s']:5.1f}/s"
            f"   stop {statistics['stop_ms_last'] or 0:7.2f} ms, {statistics['pages_last']} pages"
            f"   lag {statistics['lag_ms']:.0f} ms"
        )
    return vm.rounds()[-1]


async def lose(alpha: Host) -> None:
    alpha.cut()
    killed = alpha.kill_all()
    say(f"alpha loses power: its cable is dead, its {len(killed)} processes are killed, curlingd too.")


async def go_on(
    before: Round, vm: LabVm, shown: dict[str, Any], backup: Node, beta: Host, qemu: Executable
) -> Result:
    taken = await backup.wait_state(VM, "active", "connecting", "unprotected", within=60)
    last = vm.rounds()[-1]
    console = Console(backup.runtime(VM) / "console.log", backup.runtime(VM) / "console.sock")
    first = await console.next_round()
    say(f"beta runs the guest. Last round seen on alpha: {last.number}; first on beta: {first.number}.")
    after = await console.wait_round(last.number + ROUNDS_AFTER)
    done = await trio.to_thread.run_sync(backup.ctl, "list")
    say(f"beta$ curlingctl list\n{done.stdout}")
    statistics, failover = shown["statistics"], taken["statistics"]
    corrupt = max(report.corrupt for report in [*vm.rounds(), *console.rounds()])
    return Result(
        engine=shown["engine"],
        accelerator=shown["accelerator"],
        qemu=".".join(map(str, qemu.version)),
        checkpoints=statistics["checkpoints"],
        checkpoints_per_s=statistics["checkpoints_per_s"],
        stop_ms_p50=statistics["stop_ms_p50"],
        stop_ms_p99=statistics["stop_ms_p99"],
        pages_p50=statistics["pages_p50"],
        detection_ms=failover["detection_ms"],
        failover_ms=failover["failover_ms"],
        guest_rounds_before=last.number,
        guest_rounds_after=after.number,
        guest_corrupt_pages=corrupt,
        # A guest that had been started anew would count from 1, one from the future would be ahead.
        ok=corrupt == 0 and first.number > 1 and after.number > last.number >= before.number,
    )


def report(result: Result) -> None:
    values = asdict(result)
    width = max(map(len, values))
    for name, value in values.items():
        say(f"  {name:{width}}  {value}")
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text(json.dumps(values, indent=2) + "\n")
    verdict = "The guest lost its host and noticed nothing." if result.ok else "The demo FAILED."
    say(f"{verdict} (in {RESULT})")


def main() -> int:
    parser = argparse.ArgumentParser(prog="make demo", description=__doc__)
    parser.add_argument("--qemu", default="system", help="a QEMU program, or the name of a Debian suite")
    options = parser.parse_args()
    with termination_as_interrupt():
        try:
            result = trio.run(demo, qemu_binary(options.qemu or "system"))
        except KeyboardInterrupt:
            say("interrupted; everything is cleaned up")
            return 130
    report(result)
    return 0 if result.ok else 1


if __name__ == "__main__":
    sys.exit(main())
