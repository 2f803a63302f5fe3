"""The rule by which learning rates are chosen, on losses made up for the purpose."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest

from neft.comparison import tuning
from neft.comparison.tuning import Trial, best, is_at_edge


def trials(
    grid: list[float], widen: int, dev_loss: Callable[[float], float | None]
) -> tuple[Trial, ...]:
    return tuning.trials(grid, widen, lambda rate: Trial(rate, dev_loss(rate)))


def tried(grid: list[float], widen: int, dev_loss: Callable[[float], float | None]) -> list[float]:
    return [trial.rate for trial in trials(grid, widen, dev_loss)]


def distance_from(optimum: float) -> Callable[[float], float]:
    return lambda rate: abs(math.log(rate / optimum))


def test_a_grid_with_its_best_inside_is_left_as_it_is() -> None:
    assert tried([1e-4, 2e-4, 4e-4], 2, distance_from(2e-4)) == [1e-4, 2e-4, 4e-4]


@pytest.mark.parametrize(
    ("optimum", "expected"),
    [
        (8e-4, [1e-4, 2e-4, 4e-4, 8e-4, 1.6e-3]),
        (4e-4, [1e-4, 2e-4, 4e-4, 8e-4]),
        (1.0, [1e-4, 2e-4, 4e-4, 8e-4, 1.6e-3]),
        (1e-4, [5e-5, 1e-4, 2e-4, 4e-4]),
        (1e-9, [2.5e-5, 5e-5, 1e-4, 2e-4, 4e-4]),
    ],
)
def test_a_grid_is_widened_where_its_best_is_at_an_edge(
    optimum: float, expected: list[float]
) -> None:
    assert tried([1e-4, 2e-4, 4e-4], 2, distance_from(optimum)) == pytest.approx(expected)


def test_unequal_steps_go_on_at_the_ratio_of_the_last_two() -> None:
    assert tried([1e-4, 1e-3, 3e-3], 1, distance_from(1.0)) == [1e-4, 1e-3, 3e-3, 9e-3]


def test_added_rates_are_round_numbers() -> None:
    assert tried([1e-3, 3e-3], 2, distance_from(1.0))[2:] == [0.009, 0.027]


def test_a_single_rate_is_not_tuned() -> None:
    assert tried([2e-3], 2, distance_from(1.0)) == [2e-3]


def test_a_single_rate_is_chosen_before_it_is_tried() -> None:
    assert best([Trial(2e-3, None)]) == Trial(2e-3, None)
    assert best([Trial(2e-3, None, "no space left")]) is None
    assert best([Trial(2e-3, math.inf, "diverged")]) == Trial(2e-3, math.inf, "diverged")


def test_nothing_is_widened_before_all_losses_are_known() -> None:
    known = {1e-4: 2.0, 2e-4: 1.0}
    assert tried([1e-4, 2e-4, 4e-4], 2, known.get) == [1e-4, 2e-4, 4e-4]
    assert best(trials([1e-4, 2e-4, 4e-4], 2, known.get)) is None


def test_a_failed_rate_loses_and_closes_its_side() -> None:
    losses = {1e-4: 2.0, 2e-4: 1.0, 4e-4: math.inf}
    found = trials(list(losses), 2, losses.get)
    assert best(found) == Trial(2e-4, 1.0)
    assert not is_at_edge(found, 2e-4)


def test_a_grid_that_failed_altogether_is_not_widened() -> None:
    assert tried([1e-4, 2e-4], 2, lambda rate: math.inf) == [1e-4, 2e-4]


def test_of_equals_the_lower_rate() -> None:
    assert best([Trial(1e-4, 1.0), Trial(2e-4, 1.0)]) == Trial(1e-4, 1.0)
    assert is_at_edge([Trial(1e-4, 1.0), Trial(2e-4, 1.0)], 1e-4)
    assert not is_at_edge([Trial(1e-4, 1.0)], 1e-4)
