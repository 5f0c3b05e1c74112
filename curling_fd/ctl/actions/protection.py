"""protect, unprotect, pause, resume, tune: what does not move the VM to another host."""

from __future__ import annotations

from typing import Any

from curling_fd.ctl import words
from curling_fd.ctl.confirm import confirmed, require_a_way_to_confirm
from curling_fd.ctl.context import Context
from curling_fd.ctl.exit_codes import ExitCode
from curling_fd.ctl.live import progress
from curling_fd.varlink.client import Client


async def protect(context: Context) -> ExitCode:
    """Start protection and show the first pass."""
    async with context.connect() as client:
        vm = await follow(context, client, "Protect", context.args.name)
    tell(context, vm)
    return ExitCode.OK if vm.get("state") == "protected" else ExitCode.FAILED


async def unprotect(context: Context) -> ExitCode:
    """End protection, once confirmed."""
    require_a_way_to_confirm(context)
    async with context.connect() as client:
        vm = await confirmed(
            context,
            client,
            "End the protection of {name}.",
            "The guest runs on, here only: if this host is lost, so is the guest's memory.",
        )
        tell(context, (await client.call("Unprotect", {"name": vm["name"]}))["vm"])
    return ExitCode.OK


async def pause(context: Context) -> ExitCode:
    """Stop the guest."""
    return await _simple(context, "Pause")


async def resume(context: Context) -> ExitCode:
    """Let the guest go on."""
    return await _simple(context, "Resume")


async def tune(context: Context) -> ExitCode:
    """Change the pace until the daemon ends."""
    wanted = {"longest_epoch": context.args.longest_epoch, "shortest_epoch": context.args.shortest_epoch}
    wanted["output_limit"] = context.args.output_limit
    async with context.connect() as client:
        tell(context, (await client.call("Tune", {"name": context.args.name, **wanted}))["vm"])
    return ExitCode.OK


async def _simple(context: Context, method: str) -> ExitCode:
    async with context.connect() as client:
        tell(context, (await client.call(method, {"name": context.args.name}))["vm"])
    return ExitCode.OK


async def follow(context: Context, client: Client, method: str, name: str) -> dict[str, Any]:
    """Call a method that takes long, show its progress, and return the VM as it is in the end."""
    vm: dict[str, Any] = {}
    with progress(context.output) as shown:
        async for reply in await client.call_more(method, {"name": name}):
            vm = reply["vm"]
            shown.show(vm)
    return vm


def tell(context: Context, vm: dict[str, Any]) -> None:
    """Print what became of a VM."""
    if context.output.as_json:
        context.output.document({"vm": vm})
    else:
        role = "" if vm.get("role") in (None, "none") else f", {vm['role']} here"
        reason = f": {vm['reason']}" if vm.get("reason") else ""
        context.output.say(f"{words.word(vm.get('name'))} is {words.state(vm)}{role}{reason}")
