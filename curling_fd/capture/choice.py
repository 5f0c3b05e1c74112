"""Opening the engine that was chosen."""

from __future__ import annotations

from contextlib import AbstractAsyncContextManager

from curling_fd.capture.engine import Engine, EngineOptions
from curling_fd.capture.incremental import open_incremental
from curling_fd.capture.probe import Choice
from curling_fd.capture.whole import open_whole
from curling_fd.qmp.client import QmpClient


def open_engine(
    qmp: QmpClient, choice: Choice, options: EngineOptions
) -> AbstractAsyncContextManager[Engine]:
    """The engine of `choice`, ready for its first pass; leaving it lets the guest run on."""
    if choice.engine == "incremental":
        return open_incremental(qmp, choice, options)
    return open_whole(choice.engine, qmp, options)
