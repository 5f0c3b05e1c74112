"""What a VM's file says about the network of the host that it comes to."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import attrs
from attrs import field, frozen

from curling_fd.network.port import Port
from curling_fd.network.words import GuestAddress, HostAddress, Route


@frozen
class Plan:
    """The table [network], see service/config_network.py; times in seconds.

    Attributes:
        patience: how long to wait for somebody else who has one of host_addresses; 0: do not ask.
        schedule: when to announce, after the guest runs.
    """

    bridge: str | None = None
    bridges: Mapping[str, str] = field(factory=dict)
    addresses: tuple[GuestAddress, ...] = ()
    host_addresses: tuple[HostAddress, ...] = ()
    routes: tuple[Route, ...] = ()
    patience: float = 0.15
    schedule: tuple[float, ...] = ()

    def localized(self, ports: Iterable[Port]) -> tuple[Port, ...]:
        """The primary's ports with this host's bridges.

        A port that is in no bridge there is put into the one of `bridge`, if that is named.
        """
        return tuple(
            attrs.evolve(port, bridge=self.bridges.get(port.bridge or "", self.bridge or port.bridge))
            for port in ports
        )
