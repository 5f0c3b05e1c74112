"""Every world that two hosts can get into that follow the table of states, whatever fails when.

A world is what the two hosts know, what is true of the guest on each, what is on its way between them, and
what the arbiter has granted. Each method between the headings is a move; `states_explorer` makes them all.

The rights rule, which the services follow beside the table: whoever wants to run the VM, or to go on without
its backup, swaps the generation first.
"""

from __future__ import annotations

from collections.abc import Mapping

from attrs import define, evolve, field

from curling_fd.failover.states import BACKUP, REPLICA_VALID, RUNS, Event, State

S, E = State, Event
Table = Mapping[tuple[State, Event], State]

#: Generations apart at which a world is left alone: what could happen there happens in nearer ones.
_FAR = 3


@define
class Host:
    """What a host knows, and what is true of the guest on it.

    Attributes:
        generation: the highest it knows of.
        guest: `running`, `stopped`, or None when there is none.
        holds: packets of the guest wait for a commit.
        took_over: the guest came here by a takeover: without protection the host is ACTIVE, not IDLE.
    """

    name: str
    state: State = S.IDLE
    generation: int = 0
    guest: str | None = None
    holds: bool = False
    took_over: bool = False

    @property
    def heard(self) -> bool:
        """What the guest sends reaches clients."""
        return self.guest == "running" and not self.holds


@define
class Link:
    """A link from the host `primary` to the other, and what is on its way.

    Attributes:
        ends: the hosts that have not closed theirs.
        shipped: the first checkpoint has left the primary.
        acknowledged, handover, taken, refused, end: that message is on its way.
    """

    primary: str
    ends: frozenset[str]
    shipped: bool = False
    acknowledged: bool = False
    handover: bool = False
    taken: bool = False
    refused: bool = False
    end: bool = False


class Impossible(Exception):
    """A move that cannot be made in this world; it has changed nothing."""


def need(condition: object) -> None:
    if not condition:
        raise Impossible


@define
class World:
    """One world.

    Attributes:
        automatic: the arbiter can say no; with `manual` only operators decide who takes over.
        forced: an operator has overruled what keeps the hosts apart.
    """

    table: Table
    automatic: bool
    hosts: dict[str, Host] = field(factory=lambda: {"a": Host("a", guest="running"), "b": Host("b")})
    link: Link | None = None
    connected: bool = True
    arbiter_answers: bool = True
    highest: int = 0
    holder: str = ""
    forced: bool = False
    used: set[tuple[State, Event]] = field(factory=set)

    def copy(self) -> World:
        hosts = {name: evolve(host) for name, host in self.hosts.items()}
        return evolve(self, hosts=hosts, link=evolve(self.link) if self.link else None)

    def key(self) -> tuple[object, ...]:
        lowest = min(self.highest, *(host.generation for host in self.hosts.values()))
        hosts = tuple(
            (host.state, host.generation - lowest, host.guest, host.holds, host.took_over)
            for host in self.hosts.values()
        )
        link = self.link and (
            self.link.primary,
            self.link.ends,
            self.link.shipped,
            self.link.acknowledged,
            self.link.handover,
            self.link.taken,
            self.link.refused,
            self.link.end,
        )
        rest = (self.connected, self.arbiter_answers, self.highest - lowest, self.holder, self.forced)
        return (hosts, link, rest)

    @property
    def far(self) -> bool:
        generations = [self.highest, *(host.generation for host in self.hosts.values())]
        return max(generations) - min(generations) >= _FAR

    # What the moves are made of

    def other(self, host: Host) -> Host:
        return self.hosts["b" if host.name == "a" else "a"]

    def allowed(self, host: Host, event: Event) -> bool:
        return (host.state, event) in self.table

    def on(self, host: Host, event: Event) -> None:
        self.used.add((host.state, event))
        host.state = self.table[host.state, event]

    def swap(self, host: Host, current: int, *, incumbent: bool = False) -> bool | None:
        """The right to run after `current`: True won, False lost, None no answer."""
        if not self.automatic:
            return True if incumbent else None
        if not self.arbiter_answers:
            return None
        if self.highest > current and (self.highest, self.holder) != (current + 1, host.name):
            return False
        self.highest, self.holder = current + 1, host.name
        host.generation = current + 1
        return True

    def whole_link(self) -> Link:
        need(self.link is not None and len(self.link.ends) == 2)
        assert self.link is not None
        return self.link

    def link_as(self, host: Host, *, primary: bool) -> Link | None:
        link = self.link
        if link is None or host.name not in link.ends:
            return None
        return link if (link.primary == host.name) is primary else None

    def leave(self, host: Host) -> None:
        """`host` closes its end of the link."""
        if self.link is not None:
            self.link.ends -= {host.name}
            if not self.link.ends:
                self.link = None

    def fence(self, host: Host, event: Event) -> None:
        self.on(host, event)
        host.guest = "stopped" if host.guest else None
        host.holds = False
        self.leave(host)

    def drop(self, host: Host, event: Event) -> None:
        """A backup gives its replica up."""
        self.on(host, event)
        self.leave(host)

    def go_alone(self, host: Host) -> None:
        """A primary in HOLDING asks for the right to go on without its backup."""
        won = self.swap(host, host.generation, incumbent=True)
        if won:
            self.on(host, E.WON)
            host.guest, host.holds = "running", False
        elif won is False:
            self.fence(host, E.LOST)

    def lose(self, host: Host, event: Event) -> None:
        """The session of `host` is over."""
        self.leave(host)
        self.on(host, event)
        if host.state is S.HOLDING:
            if host.guest == "running":
                self.go_alone(host)
        elif host.guest is not None and host.state in RUNS:
            host.guest, host.holds = "running", False

    def say_end(self, host: Host) -> None:
        link = self.link_as(host, primary=True)
        if link is not None:
            link.end = self.connected
        self.leave(host)

    # The network and the arbiter

    def cut_or_heal(self) -> None:
        self.connected = not self.connected
        if self.link is not None and not self.connected:  # what was on its way is lost
            self.link = Link(self.link.primary, self.link.ends, self.link.shipped)

    def arbiter_fails_or_comes_back(self) -> None:
        need(self.automatic)
        self.arbiter_answers = not self.arbiter_answers

    # The primary

    def protects(self, host: Host) -> None:
        need(host.guest == "running" and self.allowed(host, E.PROTECT))
        self.on(host, E.PROTECT)

    def connects(self, host: Host, *, standby_starts: bool = True) -> None:
        need(host.state is S.CONNECTING)
        peer = self.other(host)
        if not self.connected:
            self.on(host, E.LINK_LOST)
            return
        if self.link is not None and peer.name in self.link.ends:
            self.notices_the_loss(peer)  # it lets go of the link it still had
        running_there = peer.state in RUNS or peer.state is S.SWITCHING
        if running_there and host.generation < peer.generation:
            host.generation = peer.generation
            self.fence(host, E.STALE)
            return
        if running_there and (host.generation == peer.generation or not self.allowed(peer, E.STALE)):
            self.on(host, E.REFUSED)
            return
        if running_there:
            peer.generation = host.generation
            self.fence(peer, E.STALE)
        if peer.state is S.FENCED:
            peer.guest, peer.took_over = None, False
        if not self.allowed(peer, E.OFFERED):
            self.on(host, E.REFUSED)
            return
        self.on(peer, E.OFFERED)
        if not self.claims(host, max(peer.generation, host.generation)):
            self.on(peer, E.LINK_LOST)
            return
        if not standby_starts:
            self.on(peer, E.REFUSED)
            self.on(host, E.REFUSED)
            return
        peer.generation = host.generation
        self.on(peer, E.PREPARED)
        self.on(host, E.PREPARED)
        self.link = Link(host.name, frozenset(self.hosts))

    def connects_in_vain(self, host: Host) -> None:
        """The backup cannot start a standby."""
        self.connects(host, standby_starts=False)

    def claims(self, host: Host, current: int) -> bool:
        """Bring the primary's generation up to what peer and arbiter know, by right."""
        if not self.automatic:
            host.generation = current
            return True
        if not self.arbiter_answers:
            self.on(host, E.REFUSED)
            return False
        current = max(current, self.highest)
        if current > host.generation and not self.swap(host, current, incumbent=True):
            self.fence(host, E.STALE)
            return False
        return True

    def fails(self, host: Host, event: Event) -> None:
        """Its QEMU or its checkpoints fail the primary; nothing need be wrong with the link."""
        need(self.link_as(host, primary=True) and self.allowed(host, event) and host.guest == "running")
        self.lose(host, event)

    def is_refused_before_a_session(self, host: Host) -> None:
        need(host.state is S.CONNECTING)
        self.on(host, E.REFUSED)

    def ships_its_first_checkpoint(self, host: Host) -> None:
        link = self.whole_link()
        need(link.primary == host.name and host.state is S.SYNCING and not link.shipped and self.connected)
        link.shipped = host.holds = True

    def hears_the_first_acknowledgement(self, host: Host) -> None:
        link = self.whole_link()
        need(link.primary == host.name and host.state is S.SYNCING and link.acknowledged)
        self.on(host, E.COMMITTED)
        link.acknowledged = False

    def notices_the_loss(self, host: Host) -> None:
        """Silence, an end that was closed, or only this side's belief."""
        need(self.link is not None and host.name in self.link.ends and self.allowed(host, E.LINK_LOST))
        self.lose(host, E.LINK_LOST)

    def asks_the_arbiter_again(self, host: Host) -> None:
        # With `manual`, a guest that was handed over goes on when the backup says that it has not got it.
        need(host.state is S.HOLDING and (self.automatic or host.guest == "running"))
        self.go_alone(host)

    def asks_whether_it_was_taken(self, host: Host) -> None:
        need(host.state is S.HOLDING and host.guest == "stopped" and not self.automatic and self.connected)
        peer = self.other(host)
        if self.link is not None and peer.name in self.link.ends:
            self.notices_the_loss(peer)
        if peer.generation > host.generation:
            host.generation = peer.generation
            self.fence(host, E.LOST)
            return
        if self.allowed(peer, E.OFFERED):  # as the question is a greeting
            self.on(peer, E.OFFERED)
            self.on(peer, E.LINK_LOST)
        self.go_alone(host)

    def ends_its_guest(self, host: Host) -> None:
        need(host.guest == "running" and self.allowed(host, E.GUEST_ENDED))
        self.on(host, E.GUEST_ENDED)
        host.guest, host.holds, host.took_over = None, False, False
        self.say_end(host)

    def is_started_by_hand(self, host: Host) -> None:
        """Whoever starts the guest on a host that lost it, or beside a backup in doubt, overrules both."""
        need(host.state in (S.ENDED, S.FENCED) and host.guest != "running")
        self.forced |= host.state is S.FENCED or self.other(host).state is not S.IDLE
        host.guest = "running"

    def unprotects(self, host: Host) -> None:
        need(self.allowed(host, E.UNPROTECT))
        # In doubt about the backup, an operator can say that the guest goes on here.
        self.forced |= host.state is S.HOLDING
        self.say_end(host)
        self.lose(host, E.UNPROTECT)
        if host.state is S.IDLE and host.guest is not None:
            host.guest, host.holds = "running", False
            if host.took_over:
                host.state = S.ACTIVE

    # A planned move

    def switches(self, host: Host) -> None:
        link = self.whole_link()
        need(link.primary == host.name and self.allowed(host, E.SWITCH))
        self.on(host, E.SWITCH)

    def hands_over(self, host: Host) -> None:
        """After the last checkpoint, which is committed: the guest stands still."""
        link = self.whole_link()
        need(link.primary == host.name and host.state is S.SWITCHING and host.guest == "running")
        host.guest, host.holds = "stopped", False
        link.handover = self.connected

    def takes_what_is_handed_over(self, host: Host) -> None:
        link = self.link_as(host, primary=False)
        need(link is not None and link.handover and host.state is S.STANDBY)
        assert link is not None
        link.handover = False
        if self.automatic and not self.swap(host, host.generation):
            link.refused = self.connected
            self.drop(host, E.DROPPED)
            return
        if not self.automatic:
            host.generation += 1
        self.on(host, E.HANDED_OVER)

    def hears_that_it_was_not_taken(self, host: Host) -> None:
        link = self.link_as(host, primary=True)
        need(link is not None and link.refused and host.state is S.SWITCHING)
        self.lose(host, E.NOT_TAKEN)

    def hears_that_it_was_taken(self, host: Host) -> None:
        link = self.link_as(host, primary=True)
        need(link is not None and link.taken and host.state is S.SWITCHING)
        self.on(host, E.TAKEN)
        host.generation, host.guest = self.other(host).generation, None
        host.holds = host.took_over = False
        self.link = None

    # The backup

    def commits_the_first_checkpoint(self, host: Host) -> None:
        link = self.whole_link()
        need(link.primary != host.name and link.shipped and host.state is S.FILLING and self.connected)
        self.on(host, E.COMMITTED)
        link.acknowledged = True

    def hears_that_it_is_over(self, host: Host) -> None:
        link = self.link_as(host, primary=False)
        need(link is not None and link.end and self.allowed(host, E.DROPPED))
        self.drop(host, E.DROPPED)

    def asks_for_the_vm(self, host: Host) -> None:
        """The primary is silent and its host does not answer."""
        need(host.state is S.SUSPECT and not self.connected and self.automatic)
        won = self.swap(host, host.generation)
        if won:
            self.on(host, E.WON)
        elif won is False:
            self.drop(host, E.LOST)

    def runs_the_standby(self, host: Host) -> None:
        need(host.state is S.TAKING_OVER)
        self.on(host, E.RUNNING)
        host.guest, host.took_over = "running", True
        link = self.link_as(host, primary=False)
        if link is not None:
            link.taken = self.connected
            self.leave(host)

    def loses_its_standby(self, host: Host) -> None:
        need(self.allowed(host, E.STANDBY_DIED))
        link = self.link_as(host, primary=False)
        if link is not None and host.state is S.TAKING_OVER:
            link.refused = self.connected
        self.drop(host, E.STANDBY_DIED)

    def fails_over_by_order(self, host: Host) -> None:
        """With `force` where the primary is alive."""
        need(host.state in REPLICA_VALID and self.allowed(host, E.ORDERED))
        if self.automatic:
            need(self.swap(host, host.generation))
        else:
            self.forced = True  # nothing but the operator's word keeps the other host from running it
            host.generation += 1
        link, primary = self.link_as(host, primary=False), self.other(host)
        if link is not None:
            if self.connected and self.link_as(primary, primary=True) and self.allowed(primary, E.STALE):
                primary.generation = host.generation
                self.fence(primary, E.STALE)
            self.leave(host)
            self.on(host, E.LINK_LOST)
        self.on(host, E.ORDERED)

    # What must hold

    def wrong(self) -> str | None:
        """What is wrong in this world, if anything is."""
        for host in self.hosts.values():
            if self.forced:
                break
            if host.guest == "running" and host.state not in RUNS | {S.IDLE, S.SWITCHING, S.ENDED}:
                return f"the guest runs on {host.name}, which is {host.state}"
            if host.state in BACKUP and host.guest is not None:
                return f"there is a guest on {host.name}, which is {host.state}"
            if host.holds and host.state not in (S.SYNCING, S.PROTECTED, S.SWITCHING, S.HOLDING):
                return f"nobody will ever release what the guest on {host.name} sends: it is {host.state}"
        if self.forced:
            return None
        one, two = self.hosts.values()
        if one.heard and two.heard:
            return "two guests are heard"
        if {one.state, two.state} <= RUNS:
            if one.generation == two.generation:
                return "two hosts run the VM by the same right"
            older = min(one, two, key=lambda host: host.generation)
            if older.heard:
                return f"the guest on {older.name}, whose right is older, is heard"
        return None
