"""Whose turn it is."""

from dataclasses import dataclass

from dylora_moe.serve.queue import FairQueue


@dataclass
class Item:
    client: str
    size: int = 1


def queue(*clients: str) -> FairQueue[Item]:
    waiting: FairQueue[Item] = FairQueue(2)
    for client in clients:
        waiting.append(Item(client))
    return waiting


def take(waiting: FairQueue[Item], places: int, served: str = "") -> str:
    return "".join(item.client for item in waiting.take(served, lambda taken, item: len(taken) < places))


def test_first_come_first_served() -> None:
    waiting = queue(*"abcd")
    assert take(waiting, 3) == "abc" and take(waiting, 3) == "d" and len(waiting) == 0


def test_one_client_has_a_share_while_others_wait() -> None:
    assert take(queue(*"aaaabc"), 4) == "aabc"
    assert take(queue(*"aab"), 1, served="aa") == "b"


def test_one_client_may_have_all_that_nobody_else_wants() -> None:
    assert take(queue(*"aaaa"), 4) == "aaaa"
    assert take(queue(*"aaab"), 4) == "aaba"


def test_who_does_not_fit_is_not_overtaken() -> None:
    waiting = queue("a", "b")
    next(iter(waiting)).size = 9
    assert waiting.take("", lambda taken, item: item.size < 5) == []
    assert len(waiting) == 2
