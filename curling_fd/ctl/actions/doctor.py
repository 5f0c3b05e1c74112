"""doctor: what would stop protection or a failover from working, found before it does."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from curling_fd.ctl import words
from curling_fd.ctl.context import Context
from curling_fd.ctl.exit_codes import ExitCode


async def doctor(context: Context) -> ExitCode:
    """Have everything checked and print it, the worst last so that it stands above the prompt."""
    parameters = {} if context.args.name is None else {"name": context.args.name}
    async with context.connect() as client:
        checks = (await client.call("Doctor", parameters))["checks"]
    failed = any(check.get("status") == "failed" for check in checks)
    output = context.output
    if output.as_json:
        output.document({"checks": checks})
    else:
        ordered = sorted(checks, key=lambda check: _SEVERITY.get(check.get("status"), 1))
        if ordered:
            output.table(("STATUS", "VM", "CHECK", "RESULT"), [_row(check) for check in ordered])
        remedies = [check for check in ordered if check.get("remedy")]
        if remedies:
            output.say("\nWhat to do:")
            for check in remedies:
                output.say(f"  {_about(check)}: {check['remedy']}")
        output.say(f"\n{_summary(checks)}" if checks else _summary(checks))
    return ExitCode.FAILED if failed else ExitCode.OK


_SEVERITY = {"ok": 0, "warning": 1, "failed": 2}


def _row(check: Mapping[str, Any]) -> tuple[str, ...]:
    return tuple(words.word(check.get(name)) for name in ("status", "vm", "check", "message"))


def _about(check: Mapping[str, Any]) -> str:
    return f"{check['vm']}, {check.get('check')}" if check.get("vm") else words.word(check.get("check"))


def _summary(checks: list[dict[str, Any]]) -> str:
    counts = {status: sum(check.get("status") == status for check in checks) for status in _SEVERITY}
    return f"{counts['failed']} failed, {counts['warning']} with a warning, {counts['ok']} ok."
