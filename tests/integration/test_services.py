"""Clients of real servers in the guest do not notice that its host dies, but for a pause."""

from __future__ import annotations

import pytest
import trio

from tests.integration.stage import VM, Stage, stage
from tests.lab.connections import connected
from tests.lab.debs import run
from tests.lab.front import CARD, CARD_2, GUEST_MAC, GUEST_MAC_2, TAP, TAP_2, WRONG_MAC, Front
from tests.lab.guests import ServerGuest
from tests.lab.roots import Executable
from tests.lab.servers import HTTP
from tests.lab.traffic import Traffic
from tests.lab.vm import LabVm

pytestmark = pytest.mark.qemu

#: Of each card, by which clients reach it; and others, of which the client asks once.
USED = {GUEST_MAC: ("10.88.0.5", "fd00:10:88::5"), GUEST_MAC_2: ("10.89.0.5", "fd00:10:89::5")}
IDLE = {GUEST_MAC: ("10.88.0.7", "fd00:10:88::7"), GUEST_MAC_2: ("10.89.0.7", "fd00:10:89::7")}

#: Steps that each client makes before the host is lost, and after.
STEPS = 20


def guest(*macs: str) -> ServerGuest:
    def with_length(address: str) -> str:
        return f"{address}/{64 if ':' in address else 24}"

    return ServerGuest(tuple(tuple(map(with_length, (*USED[mac], *IDLE[mac]))) for mac in macs))


@pytest.mark.parametrize("cards", [1, 2])
async def test_ssh_http_and_redis_over_ipv4_and_ipv6_survive_the_host(
    unstable_qemu: Executable, cards: int
) -> None:
    macs = (GUEST_MAC, GUEST_MAC_2)[:cards]
    servers = guest(*macs)
    vm = LabVm(qemu=unstable_qemu, guest=servers, extra=(*CARD, *CARD_2)[: 4 * cards])
    async with stage(vm, with_front=True, taps=(TAP, TAP_2)[:cards]) as here:
        wire = here.front
        assert wire is not None
        with here.beta.entered():
            for tap in (TAP, TAP_2)[:cards]:
                run(["ip", "link", "delete", tap])
        await here.protect(5)
        # With two cards, IPv4 on the one and IPv6 on the other: the machine's time is for as many clients.
        used = (USED[macs[0]][0], USED[macs[-1]][1])
        traffic = Traffic(wire.client, servers.servers(), used)
        async with trio.open_nursery() as nursery:
            await nursery.start(traffic.run)
            await asked(wire, *macs)
            await told(here, *used, *(address for mac in macs for address in IDLE[mac]))
            await traffic.more(STEPS, within=120)
            traffic.measure()
            here.lose_alpha()
            for mac in macs:
                for address in IDLE[mac]:
                    wire.mislead(address)
            await here.taken_over()
            await found_at("beta", wire, *macs)
            await traffic.more(STEPS, within=120)
            print("longest pauses, s:", traffic.gaps())
            traffic.stop()
        assert min(traffic.gaps().values()) > 0.5, "each was under way when the host was lost"
        assert (await here.backup.show(VM))["generation"] == 2
        await here.goes_on()


async def asked(wire: Front, *macs: str) -> None:
    """Have the client ask for the addresses that nothing else uses."""
    for mac in macs:
        for address in IDLE[mac]:
            async with connected(wire.client, address, HTTP):
                pass
            assert wire.neighbours()[address][0] == mac


async def told(here: Stage, *addresses: str) -> None:
    """Wait until the backup knows that the guest has them all."""
    kept = here.backup.directory / "run" / f"{VM}.network.json"
    with trio.fail_after(60):
        while True:
            text = kept.read_text()
            if all(f'"{address}"' in text for address in addresses):
                return
            await trio.sleep(0.02)


async def found_at(host: str, wire: Front, *macs: str) -> None:
    """Bridge and caches of the client lead to the guest at `host`, also where the client was misled."""
    with trio.fail_after(20):
        for mac in macs:
            await wire.leads_to(host, mac)
        while True:
            known = wire.neighbours()
            if all(known[address][0] == mac for mac in macs for address in IDLE[mac]):
                break
            await trio.sleep(0.01)
    assert WRONG_MAC not in {mac for mac, _ in known.values()}
