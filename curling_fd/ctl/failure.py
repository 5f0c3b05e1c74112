"""How a command fails: what curlingctl prints and with what it exits."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from attrs import field, frozen

from curling_fd.ctl.exit_codes import ExitCode, exit_code
from curling_fd.errors import CurlingError
from curling_fd.sentences import sentence
from curling_fd.varlink.failures import error_facts, error_name


@frozen
class Failure:
    """The end of a command that did not do what it was asked."""

    error: str
    text: str
    remedy: str
    code: ExitCode
    facts: Mapping[str, Any] = field(factory=dict)

    def document(self) -> dict[str, Any]:
        """Return it as --json shows it."""
        return {"error": self.error, "text": self.text, "remedy": self.remedy, "facts": dict(self.facts)}


class CommandFailed(Exception):
    """Raised by an action to end its command; `failure` says how."""

    def __init__(self, failure: Failure) -> None:
        super().__init__(failure.text)
        self.failure = failure


def failure_of(error: CurlingError) -> Failure:
    """Make the failure an error of Curling stands for."""
    words = sentence(error)
    return Failure(error_name(error), words.text, words.remedy, exit_code(error), error_facts(error))


def usage_failure(text: str, remedy: str) -> CommandFailed:
    """Make the failure of a command line that is wrong."""
    return CommandFailed(Failure("UsageError", text, remedy, ExitCode.USAGE))
