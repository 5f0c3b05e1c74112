"""What every action is handed: the parsed command line, the output, the way to the daemon."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any

import trio
from attrs import frozen

from curling_fd.ctl.render import Output
from curling_fd.errors import DaemonUnreachable, NotPermitted
from curling_fd.units import format_duration
from curling_fd.varlink.client import Client

PATIENCE = 30.0
"""Seconds a question may take that the daemon answers from memory, its start by the socket included. What
changes a VM takes its time."""


@frozen
class Context:
    """One run of curlingctl."""

    args: Namespace
    output: Output

    @asynccontextmanager
    async def connect(self) -> AsyncIterator[Client]:
        """Connect to the daemon for the duration of a block.

        Raises:
            DaemonUnreachable: there is none.
            NotPermitted: the socket is not open to us.
        """
        try:
            client = await Client.connect(self.args.socket)
        except NotPermitted as error:
            raise NotPermitted(self.args.command, error.group, error.uid) from None
        async with client:
            yield client

    async def ask(
        self, client: Client, method: str, parameters: Mapping[str, Any] | None = None
    ) -> dict[str, Any]:
        """Call a method that only tells something.

        Raises:
            DaemonUnreachable: no answer within `PATIENCE`: the daemon hangs.
        """
        with trio.move_on_after(PATIENCE):
            return await client.call(method, parameters)
        raise DaemonUnreachable(self.args.socket, f"it did not answer within {format_duration(PATIENCE)}")
