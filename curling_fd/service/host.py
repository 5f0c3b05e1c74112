"""What all VMs of one daemon share."""

from __future__ import annotations

import trio
from attrs import define

from curling_fd.disk.markers import MarkerStore
from curling_fd.service.config import DaemonConfig
from curling_fd.service.journal import Journal
from curling_fd.service.store import Store


@define
class Host:
    """This host: its configuration, its memory, its log, and the nursery its long work runs in."""

    config: DaemonConfig
    store: Store
    journal: Journal
    nursery: trio.Nursery
    markers: MarkerStore

    @property
    def name(self) -> str:
        return self.config.host_name
