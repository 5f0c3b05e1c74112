"""watch, events: what changes."""

from __future__ import annotations

import time
from typing import Any

import trio

from curling_fd.ctl import words
from curling_fd.ctl.context import Context
from curling_fd.ctl.exit_codes import ExitCode
from curling_fd.ctl.live import Screen, screen
from curling_fd.units import format_duration
from curling_fd.varlink.client import Client, Replies


async def watch(context: Context) -> ExitCode:
    """Show the VMs, again and again."""
    interval: float = context.args.interval
    parameters: dict[str, Any] = {"interval_ms": round(interval * 1000)}
    if context.args.name is not None:
        parameters["name"] = context.args.name
    async with context.connect() as client:
        replies = await client.call_more("Watch", parameters)
        with screen(context.output, format_duration(interval)) as shown:
            seen = 0
            while context.args.count is None or seen < context.args.count:
                shown.show((await _next(replies, shown, interval))["vms"])
                seen += 1
    return ExitCode.OK


async def _next(replies: Replies, shown: Screen, interval: float) -> dict[str, Any]:
    """Wait for the next reply; say so when none comes in time: a picture that stands still looks like good
    news."""
    while True:
        with trio.move_on_after(interval + 1):
            return await anext(replies)
        shown.silent()


async def events(context: Context) -> ExitCode:
    """Print what happened, then what happens."""
    async with context.connect() as client:
        await _print_events(context, client)
    return ExitCode.OK


async def _print_events(context: Context, client: Client) -> None:
    since = None if context.args.new else context.args.since
    seen = 0
    if context.args.count == 0:
        return
    async for reply in await client.call_more("Events", {} if since is None else {"since": since}):
        event = reply["event"]
        if context.output.as_json:
            context.output.item(event)
        else:
            context.output.say(words.event_line(event, time.time()))
        seen += 1
        if seen == context.args.count:
            return
