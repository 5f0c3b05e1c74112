"""completion, check-config: what needs no daemon."""

from __future__ import annotations

from curling_fd.ctl.context import Context
from curling_fd.ctl.exit_codes import ExitCode
from curling_fd.ctl.failure import failure_of
from curling_fd.service.config import DEFAULT_PATH, examine


async def completion(context: Context) -> ExitCode:
    """Print the completion script for a shell."""
    import shtab

    from curling_fd.ctl.parser import COMPLETION_PREAMBLE, make_parser

    script = shtab.complete(
        make_parser(), context.args.shell, preamble=COMPLETION_PREAMBLE[context.args.shell]
    )
    if context.output.as_json:
        context.output.document({"shell": context.args.shell, "script": script})
    else:
        print(script)
    return ExitCode.OK


async def check_config(context: Context) -> ExitCode:
    """Read the configuration as the daemon would and print everything that is wrong with it."""
    output = context.output
    config, problems = examine(context.args.path)
    failures = [failure_of(problem) for problem in problems]
    if config is not None:
        names = list(config.vms)
        if output.as_json:
            output.document({"ok": True, "path": context.args.path or DEFAULT_PATH, "vms": names})
        else:
            found = f"{len(names)} VM{'s' if len(names) != 1 else ''}" + (
                f": {', '.join(names)}" if names else ""
            )
            output.say(f"OK: {context.args.path or DEFAULT_PATH}, {found}")
        return ExitCode.OK
    if output.as_json:
        output.document({**failures[0].document(), "problems": [failure.document() for failure in failures]})
    else:
        for failure in failures:
            output.failure(failure)
    return ExitCode.CONFIG
