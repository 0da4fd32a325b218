"""Requests that wait: first come, first served, but nobody keeps all places while others wait."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import Generic, Protocol, TypeVar


class Owned(Protocol):
    """Something that belongs to a client."""

    @property
    def client(self) -> str:
        """Whose it is."""
        ...


T = TypeVar("T", bound=Owned)


class FairQueue(Generic[T]):
    """In order of arrival, but where others wait too, no client takes more than a share of the places.

    Args:
        most_of_one: Places that one client may have while others wait.
    """

    def __init__(self, most_of_one: int) -> None:
        self._most = max(1, most_of_one)
        self._waiting: list[T] = []

    def __len__(self) -> int:
        return len(self._waiting)

    def __iter__(self) -> Iterator[T]:
        return iter(list(self._waiting))

    def append(self, item: T) -> None:
        """Behind all others."""
        self._waiting.append(item)

    def take(self, served: Iterable[str], fits: Callable[[list[T], T], bool]) -> list[T]:
        """Those whose turn it is.

        Args:
            served: Clients that have a place now, as often as they have one.
            fits: Whether one more can be taken with those taken before. The first that does not ends the taking:
                who needs much room would else wait for ever.
        """
        places, taken, waiting = Counter(served), [], list(self._waiting)
        while waiting:
            following = self._next(waiting, places)
            if not fits(taken, following):
                break
            taken.append(following)
            places[following.client] += 1
            waiting.remove(following)
        self._waiting = waiting  # at the end: where `fits` fails, nobody is lost
        return taken

    def remove(self, item: T) -> None:
        """It waits no longer."""
        self._waiting.remove(item)

    def _next(self, waiting: list[T], places: Counter[str]) -> T:
        within = (item for item in waiting if places[item.client] < self._most)
        return next(within, waiting[0])
