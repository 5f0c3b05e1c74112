"""failover, switch: the VM goes on at the other host."""

from __future__ import annotations

from curling_fd.ctl import words
from curling_fd.ctl.actions.protection import follow, tell
from curling_fd.ctl.confirm import confirmed, require_a_way_to_confirm
from curling_fd.ctl.context import Context
from curling_fd.ctl.exit_codes import ExitCode


async def failover(context: Context) -> ExitCode:
    """Continue the VM here from its last checkpoint, once confirmed."""
    require_a_way_to_confirm(context)
    forced = " Even if its primary is alive." if context.args.force else ""
    async with context.connect() as client:
        vm = await confirmed(
            context,
            client,
            "Fail {name} over to this host." + forced,
            "The guest goes on here from its newest committed checkpoint; what it did since is lost.",
        )
        vm = (await client.call("Failover", {"name": vm["name"], "force": context.args.force}))["vm"]
    tell(context, vm)
    took = words.statistic(vm, "failover_ms")
    if took is not None and not context.output.as_json:
        context.output.say(f"The guest ran {words.milliseconds(took)} after the decision.")
    return ExitCode.OK


async def switch(context: Context) -> ExitCode:
    """Move the VM to its backup without loss, once confirmed."""
    require_a_way_to_confirm(context)
    async with context.connect() as client:
        vm = await confirmed(
            context,
            client,
            "Move {name} to its backup host, and make this host the backup.",
            "The guest stands still for a moment; nothing is lost.",
        )
        vm = await follow(context, client, "Switch", vm["name"])
    tell(context, vm)
    return ExitCode.OK
