"""Intervals over rows and seeds hold the truth; pairs are told apart by Holm's rule."""

import itertools
from math import atan, pi, sqrt
from time import process_time

import numpy as np
import pytest
import simulated_comparisons
from planting import Bug, each_is_caught, law

from peft_from_scratch.common.statistics import t_quantile, t_tail, wilson
from peft_from_scratch.comparison import intervals
from peft_from_scratch.comparison.intervals import Pair, interval, pairs, seeds_luck


def drawn(seed, *, rows=50, seeds=3, whole=False):
    """{method: scores}: two that do not train, three that do."""
    dice = np.random.default_rng(seed)
    hard = dice.normal(0, 1.5, rows)
    found = {}
    for i, many in enumerate((1, 1, seeds, seeds, seeds)):
        noise = dice.normal(0, 1, (many, rows)) + dice.normal(0, 0.3, (many, 1))
        scores = 1 / (1 + np.exp(-(hard + 0.7 * i - 1 + noise)))
        found[f"m{i}"] = (scores > 0.5).astype(float) if whole else scores
    return found


@law
def students_tail_is_the_closed_form():
    for t in (0.0, 0.3, 1.0, 4.0, 40.0):
        assert t_tail(t, 1) == pytest.approx(1 - 2 / pi * atan(t), abs=1e-12)
        assert t_tail(t, 2) == pytest.approx(1 - t / sqrt(2 + t * t), abs=1e-12)
    for df, p in itertools.product((2.5, 14, 301.5), (0.6, 0.975, 0.9993)):
        assert t_tail(t_quantile(p, df), df) == pytest.approx(2 * (1 - p), abs=1e-9)


@law
def one_seed_of_right_and_wrong_has_wilsons_interval():
    for k, n in ((0, 20), (7, 20), (20, 20), (46, 100)):
        right = np.array([[1.0] * k + [0.0] * (n - k)])
        assert interval(right, None) == wilson(k, n)
        # The same rows as three equal seeds: nothing is known from them that is new.
        low, high = interval(np.repeat(right, 3, 0), intervals.Luck(0.0, 2))
        assert low == pytest.approx(wilson(k, n)[0], abs=0.02)
        assert high == pytest.approx(wilson(k, n)[1], abs=0.02)


@law
def intervals_hold_the_truth_95_times_of_100():
    """With luck of the seeds and without: slow, so few; the helper's main does many."""
    for name, times in (("seeds differ by 9 points", 20), ("two methods", 60)):
        held = simulated_comparisons.coverage(name, times)
        assert held["score"] >= 0.9 and 0.9 <= held["difference"] < 1, name
        assert held["bootstrap"] < held["difference"]


@law
def intervals_hold_the_truth_where_rows_share_words():
    """They would hold it too rarely if they took such rows for independent ones."""
    knows = simulated_comparisons.coverage("rows share words", 40)
    assert knows["score"] >= 0.9 and knows["difference"] >= 0.9
    blind = simulated_comparisons.coverage("rows share words", 40, clustered=False)
    assert blind["score"] < 0.85 and blind["difference"] < 0.9


@law
def a_row_a_cluster_is_no_cluster():
    found = drawn(5, whole=True)
    names = [f"row {i}" for i in range(50)]
    luck = seeds_luck(found)
    for table in found.values():
        assert interval(table, luck, names) == interval(table, luck)
        assert interval(table, luck) == interval(table, luck, None)
    for one, other in zip(pairs(found), pairs(found, names), strict=True):
        assert vars(one) == pytest.approx(vars(other), abs=1e-12)


@law
def clusters_of_equal_rows_are_as_many_rows():
    """Every row written four times: the interval of the rows that there are."""
    found = drawn(6, rows=40, seeds=3)
    four = {key: np.repeat(table, 4, 1) for key, table in found.items()}
    names, luck = np.repeat(np.arange(40), 4).tolist(), seeds_luck(found)
    for key, table in found.items():
        assert interval(four[key], luck, names) == pytest.approx(interval(table, luck))
    for name in ("no", "yes"):
        table = np.full((3, 40), float(name == "yes"))
        repeated = interval(np.repeat(table, 4, 1), luck, names)
        assert repeated == pytest.approx(interval(table, luck))
    assert intervals._rows_df(np.full(40, 4)) == pytest.approx(39)
    values = found["m3"].mean(0)
    assert intervals._rows_variance(values, None) == pytest.approx(
        values.var(ddof=1) / 40
    )


@law
def few_equal_methods_are_told_apart_by_chance():
    assert (
        simulated_comparisons.coverage("all methods equal", 12)["family error"] <= 0.1
    )


@law
def the_luck_of_seeds_widens_the_intervals():
    """Seeds that agree row by row, and the same mean from seeds that do not."""
    rows = np.arange(100)
    steady = {k: np.repeat([(rows < n) * 1.0], 3, 0) for k, n in (("a", 60), ("b", 80))}
    lucky = {
        k: np.array([(rows < n + by) * 1.0 for by in (-15, 0, 15)])
        for k, n in (("a", 60), ("b", 80))
    }
    assert seeds_luck(steady).share == pytest.approx(0)
    assert seeds_luck(lucky).share == pytest.approx(
        2 * 0.15**2 / (0.6 * 0.4 + 0.8 * 0.2)
    )
    assert seeds_luck(lucky).df == 4
    for found in (steady, lucky):
        assert [p.difference for p in pairs(found)] == [pytest.approx(-0.2)]
    assert pairs(steady)[0].apart and not pairs(lucky)[0].apart
    for key in "ab":
        narrow = np.diff(interval(steady[key], seeds_luck(steady)))
        wide = np.diff(interval(lucky[key], seeds_luck(lucky)))
        assert wide > 1.5 * narrow
    assert seeds_luck({"a": steady["a"][:1]}) is None


@law
def a_method_of_more_luck_keeps_its_own():
    rows = np.arange(100)
    steady = {f"s{i}": np.repeat([(rows < 70) * 1.0], 3, 0) for i in range(9)}
    unsteady = np.array([(rows < n) * 1.0 for n in (50, 70, 90)])
    luck = seeds_luck(steady | {"u": unsteady})
    assert intervals._share(unsteady, luck) == pytest.approx(0.04 / 0.21)
    assert intervals._share(steady["s0"], luck) == pytest.approx(luck.share)
    assert luck.share == pytest.approx(0.004 / 0.21)


@law
def pairs_are_told_apart_by_holms_rule():
    """Against the rule as Holm writes it, one hypothesis after the other."""
    for seed, whole in itertools.product(range(4), (True, False)):
        found = pairs(drawn(seed, whole=whole))
        assert len(found) == 10
        waiting = sorted(found, key=lambda pair: pair.p)
        going = True
        for i, pair in enumerate(waiting):
            going = going and pair.p <= 0.05 / (10 - i)
            assert pair.apart == going


@law
def the_least_difference_is_where_a_pair_is_told_apart():
    for seed, whole in itertools.product(range(4), (True, False)):
        for pair in pairs(drawn(seed, whole=whole)):
            assert pair.apart == (abs(pair.difference) >= pair.least)


@law
def a_pair_seen_from_the_other_side_is_turned():
    found = drawn(3)
    back = pairs(dict(reversed(found.items())))
    turned = {(p.of, p.over): p for p in map(intervals.turned, back)}
    for pair in pairs(found):
        same = turned[pair.of, pair.over]
        for name in ("difference", "low", "high", "p", "least"):
            assert getattr(same, name) == pytest.approx(getattr(pair, name), abs=1e-9)


@law
def every_interval_is_within_its_scale_and_holds_its_value():
    """At the ends of the scale, with one row, and with rows that all agree, too."""
    for rows, seeds, rate in itertools.product((1, 30), (1, 3), (0, 1, 0.25)):
        found = drawn(rows, rows=rows, seeds=seeds)
        found["flat"] = np.full((seeds, rows), float(rate))
        luck = seeds_luck(found)
        for table in found.values():
            low, high = interval(table, luck)
            assert (
                0 <= low <= table.mean() + 1e-12 and table.mean() - 1e-12 <= high <= 1
            )
            assert low < high
        for pair in pairs(found):
            assert -1 <= pair.low <= pair.difference + 1e-12
            assert pair.difference - 1e-12 <= pair.high <= 1 and pair.low < pair.high


@law
def rows_are_paired():
    """What is hard for both cancels: the interval is narrower than with other rows."""
    dice = np.random.default_rng(0)
    a = (dice.random((1, 200)) < 0.5) * 1.0
    b = np.where(np.arange(200) < 20, 1.0, a)
    (paired,) = pairs({"a": a, "b": b})
    (mixed,) = pairs({"a": a, "b": dice.permutation(b[0])[None]})
    assert paired.apart and not mixed.apart
    assert paired.high - paired.low < 0.5 * (mixed.high - mixed.low)


def test_methods_on_other_rows_are_refused():
    with pytest.raises(ValueError, match=r"'a': 3, 'b': 4.*same rows"):
        pairs({"a": np.ones((1, 3)), "b": np.ones((1, 4))})


def test_nine_methods_are_compared_in_two_seconds():
    """300 rows and three seeds of each: 36 pairs."""
    dice = np.random.default_rng(0)
    scores = {f"m{i}": (dice.random((3, 300)) < 0.5) * 1.0 for i in range(9)}
    start = process_time()
    assert len(pairs(scores)) == 36
    assert process_time() - start < 2


def test_one_method_has_no_pair():
    assert pairs({"a": np.ones((1, 3))}) == []


@law
def few_rows_tell_nothing_apart():
    """Four rows, all right and all wrong: by chance in one case of eight."""
    for right in ([1.0, 1.0, 1.0, 0.0], [1.0] * 4):
        (pair,) = pairs({"a": np.array([right]), "b": np.zeros((1, 4))})
        assert isinstance(pair, Pair) and not pair.apart
        assert pair.difference == np.mean(right)


@law
def two_methods_right_on_the_same_rows_may_differ_a_little():
    right = np.array([[1.0] * 60 + [0.0] * 40])
    (pair,) = pairs({"a": right, "b": right})
    assert pair.difference == 0 and not pair.apart
    assert -0.05 < pair.low < -0.02 and 0.02 < pair.high < 0.05


@law
def the_degrees_of_freedom_are_between_those_of_the_parts():
    luck = intervals.Luck(0.1, 4)
    assert intervals._df(0.3, 99, 0.0, None) == 99
    assert intervals._df(1e-9, 99, 0.3, luck) == pytest.approx(4)
    assert intervals._df(0.2, 99, 0.2, luck) == pytest.approx(4 / (1 / 99 + 1 / 4))


BUGS = {
    "the tail starts at zero": Bug(
        t_tail, "(pi / 2 - start)", "(pi / 2)", students_tail_is_the_closed_form
    ),
    "the luck is that of the mean": Bug(
        seeds_luck,
        "m.var(ddof=1)",
        "m.var(ddof=1) / 3",
        the_luck_of_seeds_widens_the_intervals,
    ),
    "seeds are left out of the interval": Bug(
        interval, "/ seeds if", "* 0 if", the_luck_of_seeds_widens_the_intervals
    ),
    "a perfect score is certain": Bug(
        interval,
        "1 / (rows_df + 1)",
        "0.0",
        every_interval_is_within_its_scale_and_holds_its_value,
    ),
    "the rows' noise is no share": Bug(
        interval,
        "spread / _possible(p)",
        "spread",
        one_seed_of_right_and_wrong_has_wilsons_interval,
    ),
    "no two rows are added": Bug(
        intervals._difference,
        "[1.0, -1.0]",
        "[]",
        few_rows_tell_nothing_apart,
    ),
    "seeds are left out of the difference": Bug(
        intervals._difference,
        "(by_row + by_seed) ** 0.5",
        "by_row ** 0.5",
        intervals_hold_the_truth_95_times_of_100,
    ),
    "rows are not paired": Bug(
        intervals._difference,
        "a.mean(0) - b.mean(0)",
        "a.mean(0) - np.sort(b.mean(0))",
        rows_are_paired,
    ),
    "Holm stays at the first bound": Bug(
        intervals.holm,
        "if p > (1 - CONFIDENCE) / (m - smaller)",
        "if p > (1 - CONFIDENCE) / m",
        pairs_are_told_apart_by_holms_rule,
    ),
    "pairs are not counted": Bug(
        intervals.holm,
        "return (1 - CONFIDENCE) / (m - smaller)",
        "return 1 - CONFIDENCE",
        pairs_are_told_apart_by_holms_rule,
    ),
    "the added rows count in the least difference": Bug(
        intervals._least,
        "* (rows + 2) / rows",
        "",
        the_least_difference_is_where_a_pair_is_told_apart,
    ),
    "unsteady methods have the pooled luck": Bug(
        intervals._share,
        "max(luck.share, own)",
        "luck.share",
        a_method_of_more_luck_keeps_its_own,
    ),
    "one end is not turned": Bug(
        intervals.turned,
        "low=-pair.high",
        "low=-pair.low",
        a_pair_seen_from_the_other_side_is_turned,
    ),
    "a perfect score counts rows and not clusters": Bug(
        interval,
        "1 / (rows_df + 1)",
        "1 / rows",
        clusters_of_equal_rows_are_as_many_rows,
    ),
    "clusters are forgotten in the difference": Bug(
        intervals._difference,
        "None if clusters is None",
        "None if True",
        intervals_hold_the_truth_where_rows_share_words,
    ),
    "the rows of a cluster cancel": Bug(
        intervals._rows_variance,
        "float(sums @ sums)",
        "float(values.var() * len(values))",
        clusters_of_equal_rows_are_as_many_rows,
    ),
    "the largest cluster is one of many": Bug(
        intervals._rows_df,
        "squares.sum() ** 2 / (squares @ squares)",
        "squares.sum()",
        clusters_of_equal_rows_are_as_many_rows,
    ),
    "few seeds are many": Bug(
        intervals._df,
        "by_seed**2 / luck.df",
        "0",
        the_degrees_of_freedom_are_between_those_of_the_parts,
    ),
}
test_a_planted_bug_is_caught = each_is_caught(BUGS)
