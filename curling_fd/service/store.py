"""What a daemon must still know about a VM after a restart, one small JSON file each."""

from __future__ import annotations

import json
import os
from pathlib import Path

from attrs import asdict, frozen

from curling_fd.errors import ConfigError


@frozen
class Remembered:
    """What is kept.

    Attributes:
        generation: the highest this host knows of.
        wanted: protection was asked for; it is taken up again after a restart.
        qmp: the monitor of the VM if this host took it over; None while the configuration's holds.
        fenced: why this host may not run the VM any more, if so.
    """

    generation: int = 0
    wanted: bool = False
    qmp: str | None = None
    fenced: str | None = None


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
        except (OSError, ValueError, TypeError) as error:
            raise ConfigError(str(path), f"the remembered state is unreadable: {error}") from None

    def save(self, vm: str, remembered: Remembered) -> None:
        """Write what to remember of `vm`; it is on disk when this returns."""
        path = self._path(vm)
        draft = path.with_suffix(".new")
        with open(draft, "w", encoding="utf-8") as file:
            json.dump(asdict(remembered), file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(draft, path)
        directory = os.open(self._directory, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)

    def _path(self, vm: str) -> Path:
        return self._directory / f"{vm}.json"
