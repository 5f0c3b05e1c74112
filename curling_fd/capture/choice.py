"""Opening the engine that was chosen."""

from __future__ import annotations

from contextlib import AbstractAsyncContextManager

from curling_fd.capture.engine import Engine, EngineOptions, Inherited
from curling_fd.capture.incremental import inherit_incremental, open_incremental
from curling_fd.capture.probe import Choice
from curling_fd.capture.whole import inherit_whole, open_whole
from curling_fd.qmp.client import QmpClient


def open_engine(
    qmp: QmpClient, choice: Choice, options: EngineOptions, inherited: Inherited | None = None
) -> AbstractAsyncContextManager[Engine]:
    """The engine of `choice`, ready for its first pass; leaving it lets the guest run on.

    Args:
        inherited: what that engine in another process has left: this one is ready for the next checkpoint.
    """
    if choice.engine == "incremental":
        if inherited is not None:
            return inherit_incremental(qmp, choice, options, inherited)
        return open_incremental(qmp, choice, options)
    if inherited is not None:
        return inherit_whole(choice.engine, qmp, options, inherited)
    return open_whole(choice.engine, qmp, options)
