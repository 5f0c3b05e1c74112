"""Calls of a host's curlingd by the control socket: an emulated CPU needs seconds to start curlingctl."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from typing import Any

from curling_fd.ctl.parser import DEFAULT_SOCKET
from curling_fd.varlink import protocol
from curling_fd.varlink.failures import CONTROL, error_from
from curling_fd.varlink.protocol import Call

from .control import Agent


async def call(agent: Agent, method: str, parameters: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The answer to one call.

    Raises:
        CurlingError: what curlingd answered.
        ConnectionError: curlingd ended first.
    """
    async with aclosing(follow(agent, method, parameters, more=False)) as answers:
        async for answer in answers:
            return answer
    raise ConnectionError(f"{agent.name}: curlingd ended before it had answered {method}")


async def follow(
    agent: Agent, method: str, parameters: Mapping[str, Any] | None = None, *, more: bool = True
) -> AsyncGenerator[dict[str, Any], None]:
    """The answers to a call with `more`, as they come, until curlingd ends them.

    Raises:
        CurlingError: what curlingd answered.
    """
    reader = protocol.MessageReader()
    async with agent.connect(DEFAULT_SOCKET) as running:
        await running.input(protocol.encode_call(Call(f"{CONTROL}.{method}", parameters or {}, more=more)))
        async with aclosing(running.output()) as output:
            async for name, data in output:
                if name == "err":
                    raise ConnectionError(f"{agent.name}: {data.decode()}")
                reader.feed(data)
                while (message := reader.next_message()) is not None:
                    reply = protocol.parse_reply(message)
                    if reply.error is not None:
                        raise error_from(reply)
                    yield dict(reply.parameters)
