"""A lab for a person at a terminal.

    python -m tests.vm shell              both hosts boot, are installed and configured; a shell in alpha
    python -m tests.vm shell beta         a shell in beta instead
    python -m tests.vm shell --guest      with a guest on alpha, and its protection
    python -m tests.vm shell --bare       without Curling
    python -m tests.vm image              only makes the disks of the hosts, if they are missing

The hosts end with the shell. How to reach the other host's serial console is said at the start.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import sys
import termios
import time
import tty
from collections.abc import Iterator

import trio

from tests.lab.hosts import termination_as_interrupt

from .control import Agent, HostLost
from .image import image
from .lab import Lab, lab
from .payload import payload
from .steps import VM, installed


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.vm", description=__doc__.partition("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    shell = commands.add_parser("shell", help="a shell in a lab host")
    shell.add_argument("host", nargs="?", choices=("alpha", "beta"), default="alpha")
    shell.add_argument("--bare", action="store_true", help="without Curling")
    shell.add_argument("--guest", action="store_true", help="with a protected guest on alpha")
    commands.add_parser("image", help="make the disks of the hosts")
    options = parser.parse_args()
    if options.command == "image":
        second = payload()
        print(image(install=installed(second)).disk, second.disk, sep="\n")
        return 0
    began = time.monotonic()

    def say(text: str) -> None:
        print(f"{time.monotonic() - began:6.1f} s  {text}", flush=True)

    with termination_as_interrupt():
        try:
            with lab("shell", say=say) as made:
                return trio.run(_shell, made, options)
        except KeyboardInterrupt:
            return 130


async def _shell(made: Lab, options: argparse.Namespace) -> int:
    async with made.connected():
        if options.bare:
            await made.power_on(*made.hosts)
        else:
            await made.set_up()
            await made.on_each(made.enable)
        if options.guest:
            await made.start_guest(made.alpha)
            made.say(f"curlingctl protect {VM}")
            await made.ctl(made.alpha, "protect", VM)
        for host in made.hosts:
            socket = made.sockets / f"{host.name}.serial"
            print(f"{host.name}'s serial console (Ctrl-] leaves it):", flush=True)
            print(f"    socat -,raw,echo=0,escape=0x1d unix-connect:{socket}", flush=True)
        host = {host.name: host for host in made.hosts}[options.host]
        return await attach(host.agent)


async def attach(agent: Agent) -> int:
    """Join this terminal and a shell in the host, until that ends; its exit status."""
    with _raw() as size:
        async with trio.open_nursery() as nursery, agent.start(["/bin/bash", "-l"], pty=size) as shell:

            async def type_in() -> None:
                while True:
                    await trio.lowlevel.wait_readable(0)
                    await shell.input(os.read(0, 4096) or None)

            async def resize() -> None:
                with trio.open_signal_receiver(signal.SIGWINCH) as signals:
                    async for _ in signals:
                        await shell.resize(*_size())

            nursery.start_soon(type_in)
            nursery.start_soon(resize)
            with contextlib.suppress(HostLost):
                async for _, data in shell.output():
                    os.write(1, data)
            nursery.cancel_scope.cancel()
    return shell.status if shell.status is not None else 1


@contextlib.contextmanager
def _raw() -> Iterator[tuple[int, int]]:
    """The terminal handed through as it is, for a block; its size. Does nothing where there is none."""
    if not sys.stdin.isatty():
        yield 25, 80
        return
    before = termios.tcgetattr(0)
    tty.setraw(0)
    try:
        yield _size()
    finally:
        termios.tcsetattr(0, termios.TCSADRAIN, before)


def _size() -> tuple[int, int]:
    columns, rows = os.get_terminal_size(0)
    return rows, columns


if __name__ == "__main__":
    sys.exit(main())
