"""Who is next: by priority, then callers in turn, then arrival. Pure."""

from __future__ import annotations

from collections import Counter, OrderedDict, deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Generic, TypeVar

Item = TypeVar("Item")


@dataclass(slots=True)
class _Class(Generic[Item]):
    """Everything of one priority. The first caller is the next to be served; served, it goes to the end."""

    returned: deque[Item] = field(default_factory=deque)
    callers: OrderedDict[str, deque[Item]] = field(default_factory=OrderedDict)


class FairQueue(Generic[Item]):
    """Items (hashable) of any number of callers; one that floods the queue makes only itself wait."""

    def __init__(self) -> None:
        self._classes: dict[int, _Class[Item]] = {}
        self._place: dict[Item, tuple[int, str]] = {}

    def __len__(self) -> int:
        return len(self._place)

    def __contains__(self, item: Item) -> bool:
        return item in self._place

    def __iter__(self) -> Iterator[Item]:
        """In the order in which they will be served if nobody joins."""
        for priority in sorted(self._classes):
            members = self._classes[priority]
            yield from members.returned
            turns = [list(items) for items in members.callers.values()]
            for turn in range(max(map(len, turns), default=0)):
                yield from (items[turn] for items in turns if turn < len(items))

    def push(self, item: Item, priority: int = 0, caller: str = "") -> None:
        """`priority`: lower is served first."""
        assert item not in self._place, f"{item!r} waits already"
        self._place[item] = (priority, caller)
        self._classes.setdefault(priority, _Class()).callers.setdefault(caller, deque()).append(item)

    def put_back(self, item: Item, priority: int = 0, caller: str = "") -> None:
        """For what had been taken before: it goes ahead of everything of its priority."""
        assert item not in self._place, f"{item!r} waits already"
        self._place[item] = (priority, caller)
        self._classes.setdefault(priority, _Class()).returned.appendleft(item)

    def peek(self) -> Item | None:
        if not self._classes:
            return None
        members = self._classes[min(self._classes)]
        return members.returned[0] if members.returned else next(iter(members.callers.values()))[0]

    def pop(self) -> Item:
        """Takes the next one: its caller has had its turn."""
        item = self.peek()
        assert item is not None, "nobody waits"
        priority, caller = self._place[item]
        members = self._classes[priority]
        is_turn = not members.returned
        self.remove(item)
        if is_turn and caller in members.callers:
            members.callers.move_to_end(caller)
        return item

    def remove(self, item: Item) -> None:
        priority, caller = self._place.pop(item)
        members = self._classes[priority]
        if item in members.returned:
            members.returned.remove(item)
        else:
            members.callers[caller].remove(item)
            if not members.callers[caller]:
                del members.callers[caller]
        if not members.returned and not members.callers:
            del self._classes[priority]

    def crowding_out(self, caller: str, priority: int = 0) -> Item | None:
        """Whom a newcomer may take the place of in a full queue: somebody of the worst priority there, the last to be
        served. If that priority is the newcomer's own, it is one of the caller who has most of them, and only if that
        one has over one more than `caller`; None if it is better.

        Whoever must refuse somebody refuses this one, and takes the newcomer in.
        """
        worst = max(self._classes, default=priority)
        candidates = [(item, self._place[item][1]) for item in self if self._place[item][0] == worst]
        if worst > priority:
            return candidates[-1][0]
        counts = Counter(owner for _, owner in candidates)
        most = max(counts, key=lambda name: counts[name], default=caller)
        if worst < priority or counts[most] <= counts[caller] + 1:
            return None
        return [item for item, owner in candidates if owner == most][-1]
