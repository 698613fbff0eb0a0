"""Statistics of evaluations: items that are kept compactly, and differences that are paired by item."""

from __future__ import annotations

import math
import statistics

import pytest

from shedder_utils.records import Metric
from shedder_utils.report.evidence import lead
from shedder_utils.report.runs import error_of_sum, mean
from shedder_utils.statistics import packed, paired_error, unpacked

FIRST, SECOND = [1, 1, 0, 1, 0, 0, 1, 1, 0, 1, 1], [1, 0, 0, 1, 0, 1, 1, 1, 0, 1, 0]


def accuracy(hits: list[int], *, with_items: bool = True) -> Metric:
    """An accuracy in points, as tables have it."""
    share, n = sum(hits) / len(hits), len(hits)
    error = 100 * math.sqrt(share * (1 - share) / (n - 1))
    return Metric(value=100 * share, stderr=error, n=n, items=packed(hits) if with_items else None)


@pytest.mark.parametrize("n", [1, 7, 8, 9, 400])
def test_items_come_back_as_they_were(n: int) -> None:
    hits = [float(place % 3 == 0) for place in range(n)]
    assert unpacked(packed(hits)).tolist() == hits
    assert len(packed(hits)) <= n / 4 + 6


def test_the_error_of_one_accuracy_is_its_own() -> None:
    assert error_of_sum([1], [accuracy(FIRST)]) == pytest.approx(accuracy(FIRST).stderr)


def test_a_difference_on_the_same_items_is_paired() -> None:
    differences = [one - other for one, other in zip(FIRST, SECOND, strict=True)]
    expected = 100 * statistics.stdev(differences) / math.sqrt(len(differences))
    both = [accuracy(FIRST), accuracy(SECOND)]
    assert error_of_sum((1, -1), both) == pytest.approx(expected)
    assert expected < math.hypot(both[0].stderr, both[1].stderr)
    assert error_of_sum((1, -1), [both[0], both[0]]) == 0


def test_the_tasks_of_a_mean_are_paired_each_for_itself() -> None:
    ours, theirs = mean([accuracy(FIRST), accuracy(SECOND[:8])]), mean([accuracy(SECOND), accuracy(FIRST[:8])])
    each = [
        error_of_sum((1, -1), [accuracy(FIRST), accuracy(SECOND)]),
        error_of_sum((1, -1), [accuracy(SECOND[:8]), accuracy(FIRST[:8])]),
    ]
    assert error_of_sum((1, -1), (ours, theirs)) == pytest.approx(math.hypot(*each) / 2)


def test_without_items_or_on_others_evaluations_are_independent() -> None:
    known, unknown = accuracy(FIRST), accuracy(SECOND, with_items=False)
    assert error_of_sum((1, -1), (known, unknown)) == pytest.approx(math.hypot(known.stderr, unknown.stderr))
    fewer = accuracy(SECOND[:6])
    assert paired_error((1, -1), [known.items, fewer.items]) is None
    assert error_of_sum((1, -1), (known, fewer)) == pytest.approx(math.hypot(known.stderr, fewer.stderr))
    assert mean([known, unknown]).items is None


def test_a_lead_of_what_both_lose_alike_has_no_error() -> None:
    dense, pruned = accuracy(FIRST), accuracy(SECOND)
    assert lead(dense, pruned, dense, pruned) == (0, 0)
    plain = [accuracy(hits, with_items=False) for hits in (FIRST, SECOND)]
    assert lead(*plain, *plain)[1] > 10
