"""The bench counts lines that did not come, and lines that came again."""

from __future__ import annotations

from tools.bench.readers import Tally, tally


def test_everything_once_is_neither_lost_nor_doubled() -> None:
    assert tally([3, 4, 5], 3, 5) == Tally(lost=0, doubled=0)


def test_lost_and_doubled_lines_are_counted_apart() -> None:
    assert tally([3, 5, 5, 5], 3, 6) == Tally(lost=2, doubled=2)
