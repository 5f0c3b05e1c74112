"""Telling a network where addresses are now: which frames, from where, and when.

The guest's go in at its port, as if it had sent them (`inject`): first RARP for each MAC, which moves it in
every switch, then for each address ARP as request and as reply, or a neighbour advertisement. The host's own
go out of the interface that has them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import trio
from attrs import frozen

from curling_fd.network.learn import Binding
from curling_fd.network.packets import (
    Address,
    advertisement,
    gratuitous_reply,
    gratuitous_request,
    reverse_request,
)
from curling_fd.network.port import Port
from curling_fd.network.words import GuestAddress

SCHEDULE = (0.0, 0.05, 0.15, 0.35, 0.75, 1.5, 3.0)
"""Seconds after the guest runs. QEMU announces itself too, by RARP: after 0, 50, 200, 450 and 800 ms."""


@frozen
class Placed:
    """Guest addresses, each with its MAC, by the name of the port they are behind; `homeless` have none."""

    by_port: dict[str, tuple[Binding, ...]]
    homeless: tuple[GuestAddress, ...]


def place(
    ports: Iterable[Port], told: Iterable[GuestAddress], learned: Mapping[str, Sequence[Binding]]
) -> Placed:
    """Bring together what the VM's file tells of the guest's addresses and what was learned.

    Args:
        ports: of the VM.
        told: by the file, which knows better than what was learned.
        learned: by the name of the port.
    """
    ports = tuple(ports)
    macs = {mac: port.name for port in ports for mac in port.macs}
    found: dict[str, dict[tuple[Address, int | None], Binding]] = {
        port.name: {(known.address, known.vlan): known for known in learned.get(port.name, ())}
        for port in ports
    }
    homeless: list[GuestAddress] = []
    for address in told:
        key = address.address, address.vlan
        mac = address.mac
        if mac is None:
            seen = [known.mac for bindings in found.values() if (known := bindings.get(key)) is not None]
            mac = seen[0] if seen else next(iter(macs)) if len(macs) == 1 else None
        name = macs.get(mac or "")
        if name is None:
            # A MAC that is no NIC's own, of a guest inside the guest: where it was seen.
            name = next((n for n, b in found.items() if any(known.mac == mac for known in b.values())), None)
        if mac is None or name is None:
            homeless.append(address)
            continue
        router = any(known.router and known.mac == mac for known in found[name].values())
        for bindings in found.values():
            bindings.pop(key, None)
        found[name][key] = Binding(mac, address.address, address.vlan, router)
    return Placed({name: tuple(bindings.values()) for name, bindings in found.items()}, tuple(homeless))


def frames(macs: Iterable[str], bindings: Iterable[Binding]) -> Iterator[bytes]:
    """What is said of MACs and addresses behind one port, in this order."""
    bindings = tuple(bindings)
    stations = dict.fromkeys(
        [*((mac, None) for mac in macs), *((known.mac, known.vlan) for known in bindings)]
    )
    for mac, vlan in stations:
        yield reverse_request(mac, vlan)
    for known in bindings:
        if known.address.version == 4:
            yield gratuitous_request(known.mac, known.address, known.vlan)
            yield gratuitous_reply(known.mac, known.address, known.vlan)
        else:
            yield advertisement(known.mac, known.address, known.vlan, router=known.router)


async def repeat(schedule: Sequence[float], rounds: Callable[[], None]) -> None:
    """Call `rounds` at each time of `schedule`, in seconds from now; what is late is not made up for."""
    began = trio.current_time()
    for number, when in enumerate(schedule):
        late = trio.current_time() - began
        if number + 1 < len(schedule) and late >= schedule[number + 1]:
            continue
        await trio.sleep_until(began + when)
        rounds()
