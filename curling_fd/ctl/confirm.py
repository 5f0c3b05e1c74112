"""Asking before something is done that cannot be undone."""

from __future__ import annotations

import sys
from typing import Any

import trio

from curling_fd.ctl import words
from curling_fd.ctl.context import Context
from curling_fd.ctl.exit_codes import ExitCode
from curling_fd.ctl.failure import CommandFailed, Failure, usage_failure
from curling_fd.varlink.client import Client


def require_a_way_to_confirm(context: Context) -> None:
    """Refuse at once when nobody can be asked and nothing was confirmed, before the daemon is.

    Raises:
        CommandFailed: with the option to add.
    """
    if context.args.confirm is None and not (sys.stdin.isatty() and sys.stderr.isatty()):
        raise usage_failure(
            f"{context.args.command} wants a confirmation, and there is no terminal to ask on.",
            f"Add --confirm {context.args.name}, with the VM's full name, when you are sure.",
        )


async def confirmed(context: Context, client: Client, question: str, consequence: str) -> dict[str, Any]:
    """Have the command confirmed and return the VM it is about; its name is the full one.

    Args:
        context: of the command, with `name` and `confirm` among its arguments.
        client: connected.
        question: what is to be done, a sentence with {name}.
        consequence: what that means, a sentence.

    Raises:
        CommandFailed: it was not confirmed; nothing was changed.
    """
    vm: dict[str, Any] = (await context.ask(client, "Show", {"name": context.args.name}))["vm"]
    name = vm["name"]
    if context.args.confirm is None:
        try:
            print(
                words.clean(_question(vm, question.format(name=name), consequence)), end="", file=sys.stderr
            )
            sys.stderr.flush()
            # Trio waits, for a Ctrl-C that comes just before a read would be lost on it.
            await trio.lowlevel.wait_readable(sys.stdin)
            answer = sys.stdin.readline().strip()
        except KeyboardInterrupt:
            failure = Failure("Interrupted", "Interrupted; nothing was changed.", "", ExitCode.INTERRUPTED)
            raise CommandFailed(failure) from None
        if answer != name:
            raise CommandFailed(
                Failure(
                    "NotConfirmed",
                    "Nothing was changed: that was not the VM's name.",
                    f"To go ahead, type {name} when asked, or add --confirm {name}.",
                    ExitCode.FAILED,
                )
            )
    elif context.args.confirm != name:
        raise usage_failure(
            f"Nothing was changed: --confirm says {context.args.confirm!r}, and {context.args.command} "
            f"would be about {name!r}.",
            f"Make sure which VM you mean, then add --confirm {name}.",
        )
    return vm


def _question(vm: dict[str, Any], question: str, consequence: str) -> str:
    now = f"{words.word(vm.get('role'))} here, {words.state(vm)}"
    if vm.get("peer"):
        now += f", peer {vm['peer']}"
    if (lag := words.statistic(vm, "lag_ms")) is not None:
        now += f", newest checkpoint {words.milliseconds(lag)} old"
    return f"{question}\n  Now: {now}.\n  {consequence}\nType the VM's name to go ahead: "
