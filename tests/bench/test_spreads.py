"""The statistics: what repeated measurements amount to, and when they say nothing."""

from __future__ import annotations

import pytest

from tools.bench.spreads import noise, quantile, ratios, spread
from tools.bench.targets import BY_KEY, TARGETS, Target, Verdict

AT_MOST_TEN = Target(key="k", text="a ratio", relation="<=", bound=10)


def test_quartiles_enclose_the_middle_half() -> None:
    found = spread([5, 1, 4, 2, 3])

    assert (found.median, found.quartiles) == (3, (2, 4))


def test_a_quantile_lies_between_its_neighbours() -> None:
    assert quantile([0, 10], 0.25) == 2.5
    assert quantile([7], 0.99) == 7


def test_a_figure_without_values_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one"):
        spread([])


def test_ratios_are_of_pairs_so_that_a_slow_round_cancels_out() -> None:
    assert ratios([2, 20, 200], [1, 10, 100]).quartiles == (2, 2)


def test_noise_is_the_farther_quartile_of_the_same_code_against_itself() -> None:
    assert noise([0.8, 0.8, 1.0, 1.05, 1.1], [1, 1, 1, 1, 1]) == pytest.approx(0.25)
    assert noise([1, 1, 1.3, 1.4, 1.5], [1, 1, 1, 1, 1]) == pytest.approx(0.4)


def test_noise_is_the_same_whichever_of_the_two_is_called_the_first() -> None:
    one, again = [1.0, 1.1, 0.9], [2.1, 2.2, 1.9]

    assert noise(one, again) == pytest.approx(noise(again, one))


@pytest.mark.parametrize(
    ("median", "differs", "verdict"),
    [
        (9.0, 0.05, Verdict.MET),
        (11.0, 0.05, Verdict.MISSED),
        (9.6, 0.05, Verdict.NOT_RESOLVED),
        (10.4, 0.05, Verdict.NOT_RESOLVED),
        (10.0, 0.0, Verdict.MET),
        (285.0, 1.1, Verdict.MISSED),
    ],
)
def test_there_is_no_verdict_where_the_same_code_may_differ(median: float, differs: float, verdict: Verdict) -> None:
    assert AT_MOST_TEN.verdict(spread([median]), differs) is verdict


@pytest.mark.parametrize(
    ("relation", "value", "verdict"),
    [("<", 10, Verdict.MISSED), (">=", 10, Verdict.MET), (">=", 9, Verdict.MISSED), ("==", 9, Verdict.MISSED)],
)
def test_a_target_says_which_side_is_the_good_one(relation: str, value: float, verdict: Verdict) -> None:
    target = Target(key="k", text="", relation=relation, bound=10)  # type: ignore[arg-type]  # one of them

    assert target.verdict(spread([value]), 0) is verdict


def test_no_two_targets_are_of_one_figure() -> None:
    assert len(BY_KEY) == len(TARGETS)
