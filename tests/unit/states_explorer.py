"""Makes every move in every world that two hosts can get into, and checks each world."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping
from functools import partial

from attrs import define

from curling_fd.failover.states import Event, State
from tests.unit.states_world import Host, Impossible, Table, World

_STEPS: tuple[Callable[[World, Host], None], ...] = (
    World.protects,
    World.connects,
    World.connects_in_vain,
    World.is_refused_before_a_session,
    World.ships_its_first_checkpoint,
    World.hears_the_first_acknowledgement,
    World.notices_the_loss,
    World.asks_the_arbiter_again,
    World.asks_whether_it_was_taken,
    World.ends_its_guest,
    World.is_started_by_hand,
    World.unprotects,
    World.switches,
    World.hands_over,
    World.takes_what_is_handed_over,
    World.hears_that_it_was_not_taken,
    World.hears_that_it_was_taken,
    World.commits_the_first_checkpoint,
    World.hears_that_it_is_over,
    World.asks_for_the_vm,
    World.runs_the_standby,
    World.loses_its_standby,
    World.fails_over_by_order,
)


def _moves(world: World) -> Iterator[tuple[str, Callable[[World], None]]]:
    for move in (World.cut_or_heal, World.arbiter_fails_or_comes_back):
        yield move.__name__, move
    for name in world.hosts:
        for step in _STEPS:
            yield f"{name} {step.__name__}", partial(_on, name, step)
        for event in (Event.CAPTURE_FAILED, Event.REFUSED):
            yield f"{name} fails: {event}", partial(_on, name, partial(World.fails, event=event))


def _on(name: str, step: Callable[[World, Host], None], world: World) -> None:
    step(world, world.hosts[name])


@define
class Found:
    """What `explore` saw. `wrong` is the shortest way to a world that must not be, and why it must not."""

    worlds: int
    transitions: set[tuple[State, Event]]
    wrong: list[str] | None


def explore(table: Table, *, automatic: bool) -> Found:
    """Make every move in every world that the first one leads to, up to the first that is wrong."""
    first = World(table, automatic)
    came_from: dict[object, tuple[object, str]] = {first.key(): (None, "")}
    waiting = deque([first])
    while waiting:
        world = waiting.popleft()
        new = world.copy()
        for name, move in _moves(world):
            try:
                move(new)
            except Impossible:
                continue
            key = new.key()
            if key not in came_from:
                came_from[key] = (world.key(), name)
                problem = new.wrong()
                if problem is not None:
                    way = [*_way(came_from, key), problem]
                    return Found(len(came_from), first.used, way)
                if not new.far:
                    waiting.append(new)
            new = world.copy()
    return Found(len(came_from), first.used, None)


def _way(came_from: Mapping[object, tuple[object, str]], key: object) -> list[str]:
    way: list[str] = []
    while key is not None:
        key, move = came_from[key]
        way.insert(0, move)
    return way
