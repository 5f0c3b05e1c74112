"""What a daemon must still know about a VM after a restart, one small JSON file each."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from attrs import Attribute, asdict, field, frozen
from attrs.validators import ge, optional

from curling_fd.errors import ConfigError
from curling_fd.system.files import replace


def _exactly(kind: type) -> Callable[[Any, Attribute[Any], Any], None]:
    """Not `instance_of`: to Python, True is a number."""

    def check(_: object, attribute: Attribute[Any], value: object) -> None:
        if type(value) is not kind:
            raise TypeError(f"`{attribute.name}` is {value!r}")

    return check


@frozen
class Remembered:
    """What is kept.

    Attributes:
        generation: the highest this host knows of.
        wanted: protection was asked for; it is taken up again after a restart.
        qmp: the monitor of the VM if this host took it over; None while the configuration's holds.
        fenced: why this host may not run the VM any more, if so.
        elsewhere: the VM was handed to the other host: `autostart` does not look for it here.
    """

    generation: int = field(default=0, validator=[_exactly(int), ge(0)])
    wanted: bool = field(default=False, validator=_exactly(bool))
    qmp: str | None = field(default=None, validator=optional(_exactly(str)))
    fenced: str | None = field(default=None, validator=optional(_exactly(str)))
    elsewhere: bool = field(default=False, validator=_exactly(bool))


class Store:
    """Files `NAME.json` in `directory`, replaced atomically and synced: no generation is forgotten."""

    def __init__(self, directory: str | os.PathLike[str]) -> None:
        self._directory = Path(directory)

    def load(self, vm: str) -> Remembered:
        """What is remembered of `vm`.

        Raises:
            ConfigError: the file is there and unreadable. Guessing a generation would be worse.
        """
        path = self._path(vm)
        try:
            return Remembered(**json.loads(path.read_text(encoding="utf-8")))
        except FileNotFoundError:
            return Remembered()
        except (OSError, ValueError, TypeError, RecursionError) as error:
            raise ConfigError(str(path), f"the remembered state is unreadable: {error}") from None

    def save(self, vm: str, remembered: Remembered) -> None:
        """Write what to remember of `vm`; it is on disk when this returns.

        Raises:
            ConfigError: it cannot be: the disk is full, say.
        """
        path = self._path(vm)
        try:
            replace(path, json.dumps(asdict(remembered)))
        except OSError as error:
            raise ConfigError(str(path), f"cannot be written: {error.strerror or error}") from None

    def _path(self, vm: str) -> Path:
        return self._directory / f"{vm}.json"
