"""Who is next: by priority, then callers in turn, then arrival. Pure."""

from __future__ import annotations

from collections import OrderedDict, deque
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

    def crowding_out(self, caller: str) -> Item | None:
        """In a full queue: the newest item of the caller with the most, if that one has over one more than `caller`.

        Whoever must refuse somebody refuses this one, and takes the newcomer in.
        """
        counts: dict[str, int] = {caller: 0}
        for _, owner in self._place.values():
            counts[owner] = counts.get(owner, 0) + 1
        most = max(counts, key=lambda name: counts[name])
        if counts[most] <= counts[caller] + 1:
            return None
        return [item for item, (_, owner) in self._place.items() if owner == most][-1]
