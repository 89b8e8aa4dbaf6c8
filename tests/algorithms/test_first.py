"""Architectures that the first generation holds, whatever the algorithm asks for."""

from nasray.algorithms.first import WithFirst


class Counting:
    """Asks for (0, ...), (1, ...) and so on, and keeps what it is told."""

    def __init__(self):
        self.next, self.told = 0, []

    def ask(self):
        self.next += 1
        return [(self.next - 1, 0), (self.next - 1, 1)]

    def tell(self, candidates):
        self.told.append([candidate for candidate in candidates])


def test_they_come_once_after_what_the_algorithm_asks_for():
    inner = Counting()
    algorithm = WithFirst(inner, [(7, 7), (0, 1), (7, 7)])
    assert algorithm.ask() == [(0, 0), (0, 1), (7, 7)]
    algorithm.tell(["a", "b", "c"])
    assert inner.told == [["a", "b", "c"]]
    assert algorithm.ask() == [(1, 0), (1, 1)]


def test_a_resumed_search_that_is_only_told_does_not_ask_for_them_again():
    algorithm = WithFirst(Counting(), [(7, 7)])
    algorithm.tell(["a"])
    assert algorithm.ask() == [(0, 0), (0, 1)]


def test_what_came_first_is_not_asked_for_again_by_the_algorithm():
    algorithm = WithFirst(Counting(), [(1, 1), (2, 0)])
    assert algorithm.ask() == [(0, 0), (0, 1), (1, 1), (2, 0)]
    assert algorithm.ask() == [(1, 0)]
    resumed = WithFirst(Counting(), [(0, 1)])
    resumed.tell(["a"])
    assert resumed.ask() == [(0, 0)]
