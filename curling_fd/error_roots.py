"""The errors that other modules of errors are derived from; see `curling_fd.errors` for the tree."""

from __future__ import annotations


class CurlingError(Exception):
    """The root. Subclasses are attrs classes; their attributes are the facts of the case."""

    def __str__(self) -> str:
        from curling_fd.sentences import sentence

        return sentence(self).text


class PrecheckFailed(CurlingError):
    """Protection cannot start; the guest was not touched."""


class RemoteProtocolError(CurlingError):
    """The other side sent what its protocol does not allow. Always final for that connection."""
