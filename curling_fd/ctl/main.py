"""curlingctl: the administrator's end of the control socket."""

from __future__ import annotations

import contextlib
import io
import os
import sys
from collections.abc import Sequence

import trio

from curling_fd.ctl.context import Context
from curling_fd.ctl.exit_codes import ExitCode
from curling_fd.ctl.failure import CommandFailed, Failure, failure_of
from curling_fd.ctl.parser import make_parser
from curling_fd.ctl.render import Output
from curling_fd.errors import CurlingError


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code. Prints everything there is to say itself."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    for stream in (sys.stdout, sys.stderr):
        # A path or a name may hold what the locale cannot write.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        code = _run(arguments)
        sys.stdout.flush()
    except BrokenPipeError:
        # Whoever read our output has seen enough. Python flushes once more at exit: let it, into nothing.
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return ExitCode.FAILED
    return code


def _run(arguments: list[str]) -> int:
    # Errors of the command line have to be told too, and may be what --json stands in.
    output = Output("--json" in arguments)
    try:
        args = make_parser().parse_args(arguments)
        code: ExitCode = trio.run(args.action, Context(args, output))
        return code
    except CommandFailed as error:
        failure = error.failure
    except CurlingError as error:
        failure = failure_of(error)
    except KeyboardInterrupt:
        failure = Failure("Interrupted", "Interrupted.", _what_goes_on(arguments), ExitCode.INTERRUPTED)
    except SystemExit as error:  # --help, --version
        return error.code if isinstance(error.code, int) else ExitCode.OK
    output.failure(failure)
    return failure.code


def _what_goes_on(arguments: list[str]) -> str:
    # curlingd does not give a VM up half way because nobody looks any more.
    changing = {"protect", "unprotect", "failover", "switch", "pause", "resume", "tune"} & set(arguments)
    return "What was begun goes on in curlingd; see 'curlingctl list'." if changing else ""


if __name__ == "__main__":
    sys.exit(main())
