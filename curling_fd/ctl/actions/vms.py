"""list, show: what there is."""

from __future__ import annotations

from curling_fd.ctl import words
from curling_fd.ctl.context import Context
from curling_fd.ctl.exit_codes import ExitCode


async def list_vms(context: Context) -> ExitCode:
    """Print all VMs, or only their names."""
    async with context.connect() as client:
        vms = (await context.ask(client, "List"))["vms"]
    output = context.output
    if context.args.names:
        for vm in vms:
            output.say(vm["name"])
    elif output.as_json:
        output.document({"vms": vms})
    elif vms:
        output.table(words.LIST_HEADERS, [words.list_row(vm) for vm in vms])
    else:
        output.say("No VMs. Put a file for each into /etc/curling/vms (docs/configuration.md).")
    return ExitCode.OK


async def show(context: Context) -> ExitCode:
    """Print everything about one VM."""
    async with context.connect() as client:
        vm = (await context.ask(client, "Show", {"name": context.args.name}))["vm"]
    if context.output.as_json:
        context.output.document({"vm": vm})
    else:
        context.output.pairs(words.word(vm.get("name")), words.details(vm))
    return ExitCode.OK
