"""The command line of curlingctl: what there is to say, and nothing of what it does."""

from __future__ import annotations

import argparse
import difflib
import re
import textwrap
from collections.abc import Awaitable, Callable
from typing import Any, NoReturn

from attrs import frozen

from curling_fd import __version__
from curling_fd.ctl.actions import doctor, local, protection, takeover, vms, watching
from curling_fd.ctl.context import Context
from curling_fd.ctl.exit_codes import MEANINGS, ExitCode
from curling_fd.ctl.failure import usage_failure
from curling_fd.units import parse_duration

DEFAULT_SOCKET = "/run/curling/control.sock"

Action = Callable[[Context], Awaitable[ExitCode]]

# shtab calls these for arguments that have them as `complete`.
_COMPLETE_VM = {"bash": "_curlingctl_vms", "zsh": "_curlingctl_vms"}
_COMPLETE_FILE = {"bash": "_shtab_compgen_files", "zsh": "_files"}
COMPLETION_PREAMBLE = {
    "bash": '_curlingctl_vms() { compgen -W "$(curlingctl list --names 2>/dev/null)" -- "$1"; }\n',
    "zsh": '_curlingctl_vms() { compadd -- ${(f)"$(curlingctl list --names 2>/dev/null)"} }\n',
}


@frozen
class Command:
    """One command: its word, a line of help, what it does, and its arguments."""

    word: str
    help: str
    action: Action
    arguments: tuple[Callable[[argparse.ArgumentParser], None], ...] = ()


class Parser(argparse.ArgumentParser):
    """A parser that raises what it does not like instead of printing it."""

    def error(self, message: str) -> NoReturn:
        """Refuse the command line.

        Raises:
            CommandFailed: always.
        """
        if unknown := re.match(r"argument COMMAND: invalid choice: '(.*?)'", message):
            nearest = difflib.get_close_matches(unknown[1], [command.word for command in COMMANDS], 1)
            hint = f"Did you mean {nearest[0]}? " if nearest else ""
            raise usage_failure(
                f"There is no command {unknown[1]!r}.", f"{hint}See '{self.prog} --help' for all of them."
            )
        raise usage_failure(f"{message[:1].upper()}{message[1:].rstrip('.')}.", f"See '{self.prog} --help'.")


def make_parser() -> argparse.ArgumentParser:
    """Make the parser; its result has `command`, `action` and the arguments of that command."""
    parser = Parser(
        prog="curlingctl",
        description="Protect running virtual machines against the loss of their host.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="exit codes:\n" + "\n".join(f"  {code:>3}  {meaning}" for code, meaning in MEANINGS.items()),
        allow_abbrev=False,
    )
    _add_common(parser, DEFAULT_SOCKET, False)
    parser.add_argument("--version", action="version", version=f"curlingctl {__version__}")
    commands = parser.add_subparsers(title="commands", dest="command", metavar="COMMAND", required=True)
    for command in COMMANDS:
        text = textwrap.fill(f"{command.help[0].upper()}{command.help[1:]}.", 100)
        # The options of all commands may stand before and after the word: here without a default, or it would
        # overwrite what stood before.
        sub = commands.add_parser(command.word, help=command.help, description=text, allow_abbrev=False)
        _add_common(sub, argparse.SUPPRESS, argparse.SUPPRESS)
        for add in command.arguments:
            add(sub)
        sub.set_defaults(action=command.action)
    return parser


def _add_common(parser: argparse.ArgumentParser, socket: str, as_json: Any) -> None:
    option = parser.add_argument(
        "--socket",
        metavar="PATH",
        default=socket,
        help=f"control socket of curlingd (default: {DEFAULT_SOCKET})",
    )
    _complete(option, _COMPLETE_FILE)
    parser.add_argument(
        "--json",
        action="store_true",
        default=as_json,
        help="write JSON: one document, or one a line for streams",
    )


def _complete(action: argparse.Action, function: dict[str, str]) -> None:
    action.complete = function  # type: ignore[attr-defined] # shtab looks for it


def _name(parser: argparse.ArgumentParser) -> None:
    _complete(
        parser.add_argument("name", metavar="NAME", help="name of a VM, or a unique beginning of one"),
        _COMPLETE_VM,
    )


def _optional_name(parser: argparse.ArgumentParser) -> None:
    _complete(
        parser.add_argument("name", metavar="NAME", nargs="?", help="only this VM (default: all)"),
        _COMPLETE_VM,
    )


def _confirm(parser: argparse.ArgumentParser) -> None:
    option = parser.add_argument(
        "--confirm", metavar="NAME", help="do not ask: NAME, the VM's full name, says that you are sure"
    )
    _complete(option, _COMPLETE_VM)


def _names(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--names", action="store_true", help="only the names, one a line")


def _force(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--force", action="store_true", help="even if the primary is heard; the arbiter still decides"
    )


def _interval(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--interval",
        metavar="TIME",
        type=_duration,
        default=1.0,
        help="time between updates, like 500ms (default: 1s)",
    )


def _count(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--count", metavar="N", type=_whole, help="end after so many (default: never)")


def _since(parser: argparse.ArgumentParser) -> None:
    group = parser.add_mutually_exclusive_group()
    group.add_argument(
        "--since",
        metavar="N",
        type=_whole,
        default=0,
        help="only events numbered above N (default: all still kept)",
    )
    group.add_argument("--new", action="store_true", help="only events that happen from now on")


def _pace(parser: argparse.ArgumentParser) -> None:
    for key, unit in (
        ("longest-epoch", "DURATION"),
        ("shortest-epoch", "DURATION"),
        ("output-limit", "SIZE"),
    ):
        parser.add_argument(
            f"--{key}",
            metavar=unit,
            help=f"as {key.replace('-', '_')} in the VM's file; unchanged if not given",
        )


def _path(parser: argparse.ArgumentParser) -> None:
    option = parser.add_argument(
        "path", metavar="PATH", nargs="?", help="of curlingd.toml (default: /etc/curling/curlingd.toml)"
    )
    _complete(option, _COMPLETE_FILE)


def _shell(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("shell", choices=("bash", "zsh"), help="for which shell")


def _duration(text: str) -> float:
    try:
        seconds = parse_duration(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    if not 0.1 <= seconds <= 3600:
        raise argparse.ArgumentTypeError(f"{text} is not from 100ms to 1h")
    return seconds


def _whole(text: str) -> int:
    if not (text.isascii() and text.isdecimal() and len(text) < 16):
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number")
    return int(text)


COMMANDS = (
    Command("list", "the VMs this host knows", vms.list_vms, (_names,)),
    Command("show", "everything about one VM", vms.show, (_name,)),
    Command("protect", "protect a VM that runs on this host", protection.protect, (_name,)),
    Command(
        "unprotect", "end the protection of a VM; its guest runs on", protection.unprotect, (_name, _confirm)
    ),
    Command(
        "failover",
        "on the backup: continue a VM from its last checkpoint when its host is lost",
        takeover.failover,
        (_name, _confirm, _force),
    ),
    Command(
        "switch",
        "on the primary: move a VM to its backup, nothing lost, roles swapped",
        takeover.switch,
        (_name, _confirm),
    ),
    Command("pause", "stop the guest of a protected VM", protection.pause, (_name,)),
    Command("resume", "let a paused guest go on", protection.resume, (_name,)),
    Command(
        "tune",
        "change the pace of a VM's checkpoints until its daemon ends",
        protection.tune,
        (_name, _pace),
    ),
    Command(
        "watch",
        "checkpoint rate, stop time, pages and lag as they change",
        watching.watch,
        (_optional_name, _interval, _count),
    ),
    Command("events", "what happened, then what happens", watching.events, (_since, _count)),
    Command("doctor", "check everything protection and a failover need", doctor.doctor, (_optional_name,)),
    Command(
        "check-config", "read the configuration and tell what is wrong with it", local.check_config, (_path,)
    ),
    Command("completion", "print a completion script for a shell", local.completion, (_shell,)),
)
