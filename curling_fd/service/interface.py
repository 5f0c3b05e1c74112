"""The control interface, read from the .varlink file beside this module."""

from __future__ import annotations

from functools import cache
from importlib import resources

from curling_fd import __version__
from curling_fd.varlink.failures import CONTROL
from curling_fd.varlink.idl import Interface, parse
from curling_fd.varlink.introspection import Identity

IDENTITY = Identity(vendor="Curling", product="curlingd", version=__version__, url="")

NEEDS_MORE = frozenset({"Watch", "Events"})
"""Methods that have no last reply."""


@cache
def control_interface() -> Interface:
    """Parse io.curling.Control once."""
    return parse(resources.files(__package__).joinpath(f"{CONTROL}.varlink").read_text("utf-8"))
