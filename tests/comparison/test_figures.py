"""Figures show the result's numbers, methods keep their looks, nothing overlaps."""

import math
import random
import xml.etree.ElementTree as ElementTree

import matplotlib.style
import numpy as np
import pytest
from figure_overlaps import assert_apart
from invented_comparisons import METHODS, comparison
from matplotlib.colors import to_hex
from matplotlib.transforms import Bbox

from peft_from_scratch.comparison import figures
from peft_from_scratch.plotting import draw, theme
from peft_from_scratch.training.config import History


def markers(figure) -> list:
    """The drawn points, each a line of one place."""
    return [line for line in figure.axes[0].lines if line.get_marker() != "None"]


def points(figure) -> dict[float, tuple]:
    """Each point by its height in percent, where all differ: (x, colour, marker)."""
    return {
        round(line.get_ydata()[0], 6): (
            line.get_xdata()[0],
            to_hex(line.get_color()),
            line.get_marker(),
        )
        for line in markers(figure)
    }


def bars(figure) -> list[list[float]]:
    """(x, low, high) of each drawn interval."""
    drawn = [c for c in figure.axes[0].collections if c.get_gid() == "interval"]
    segments = [collection.get_segments()[0] for collection in drawn]
    return [[low[0], low[1], high[1]] for low, high in segments]


def labels(figure) -> list:
    return [text for text in figure.texts if text.get_gid() == "label"]


def named(figure) -> list[str]:
    """Every method that a label or the legend names."""
    texts = labels(figure) + [t for box in figure.legends for t in box.get_texts()]
    return sorted(text.get_text().replace("\n", " ") for text in texts)


def boxes(figure) -> list[Bbox]:
    """What must not overlap: texts, the legend, and points with their intervals."""
    figure.canvas.draw()  # puts the axis texts where they belong
    axes = figure.axes[0]
    texts = [*figure.texts, *axes.texts, axes.xaxis.label]
    found = [text.get_window_extent() for text in texts if text.get_text()]
    found += [tick.get_window_extent() for tick in axes.get_xticklabels()]
    found += [legend.get_window_extent() for legend in figure.legends]
    radius = 3.5 / 72 * figure.dpi
    for x, low, high in bars(figure):
        (y,) = (
            line.get_ydata()[0] for line in markers(figure) if on(line, x, low, high)
        )
        ends = axes.transData.transform([(x, low), (x, high), (x, y)])
        point = Bbox.from_extents(*(ends[2] - radius), *(ends[2] + radius))
        found.append(Bbox.union([Bbox(ends[:2]), point]))
    return found


def on(line, x, low, high) -> bool:
    """Whether a drawn point is on the bar at x from low to high."""
    y = line.get_ydata()[0]
    return line.get_xdata()[0] == x and low - 1e-3 <= y <= high + 1e-3


def separated(result: dict) -> dict:
    """The result with rates that all differ, so that a point tells its row."""
    for i, row in enumerate(result["rows"]):
        row["exact"]["rate"] = min(1, row["exact"]["rate"] * 0.9 + i / 1000)
        row["exact"]["high"] = max(row["exact"]["high"], row["exact"]["rate"])
        row["exact"]["low"] = min(row["exact"]["low"], row["exact"]["rate"])
    return result


@pytest.mark.parametrize("many", range(2, 16))
def test_nothing_overlaps_and_every_method_is_named_once(many):
    methods = random.Random(many).sample(list(METHODS), many)
    result = separated(comparison(methods, seed=many))
    width = (7.4, 4.2)[many // 2 % 2]
    figure = figures.quality_against_parameters(result, width=width)
    assert_apart(figure, dict(enumerate(boxes(figure))))
    names = [f"{row['label']} ({row['letters']})" for row in result["rows"]]
    assert named(figure) == sorted(names)
    assert not (labels(figure) and figure.legends)


def test_a_result_without_pairs_has_no_letters():
    result = comparison(["few-shot", "lora", "full"], seed=1)
    for row in result["rows"]:
        del row["letters"]
    assert "shared letter" in " ".join(
        text.get_text()
        for text in figures.quality_against_parameters(comparison(seed=1)).texts
    )
    figure = figures.quality_against_parameters(result)
    assert named(figure) == sorted(row["label"] for row in result["rows"])
    assert not any("letter" in text.get_text() for text in figure.texts)


def test_labels_keep_clear_of_each_other_where_nothing_succeeds():
    result = comparison()
    for row in result["rows"]:
        row["exact"] |= {"rate": 0.0, "low": 0.0, "high": 0.04}
        del row["letters"]
    figure = figures.quality_against_parameters(result)
    assert len(labels(figure)) == 5
    assert_apart(figure, dict(enumerate(boxes(figure))))


def test_few_points_have_labels_and_crowded_ones_a_legend():
    few = comparison(["few-shot", "lora", "full"], seed=1)
    assert labels(figures.quality_against_parameters(few))
    crowded = comparison(tuple(METHODS), seed=1)
    for row in crowded["rows"]:
        row["exact"] |= {"rate": 0.5, "low": 0.1, "high": 0.9}
    assert figures.quality_against_parameters(crowded).legends


def test_points_and_intervals_are_those_of_the_result():
    result = separated(comparison(seed=3))
    figure = figures.quality_against_parameters(result)
    drawn, intervals = points(figure), bars(figure)
    for row in result["rows"]:
        exact = row["exact"]
        x, *_ = drawn[round(100 * exact["rate"], 6)]
        assert [x, 100 * exact["low"], 100 * exact["high"]] in [
            pytest.approx(bar) for bar in intervals
        ]
    assert len(intervals) == len(result["rows"])


def test_the_band_is_the_interval_of_few_shot():
    result = comparison(seed=5)
    exact = result["rows"][1]["exact"]
    (band,) = figures.quality_against_parameters(result).axes[0].patches
    drawn = [band.get_y(), band.get_y() + band.get_height()]
    assert drawn == pytest.approx([100 * exact["low"], 100 * exact["high"]])
    alone = comparison(["zero-shot", "lora"])
    assert not figures.quality_against_parameters(alone).axes[0].patches


def test_points_stand_where_the_ticks_say():
    result = separated(comparison(["zero-shot", "prompt", "prefix", "lora", "full"]))
    figure = figures.quality_against_parameters(result)
    axes = figure.axes[0]
    units = {"": 1, "k": 1e3, "M": 1e6, "B": 1e9}
    ticks = {}
    for place, text in zip(axes.get_xticks(), axes.get_xticklabels(), strict=True):
        number, _, unit = text.get_text().partition(" ")
        ticks[float(number) * units[unit]] = place
    zero = ticks.pop(0)
    assert zero < min(ticks.values())
    for row in result["rows"]:
        x, *_ = points(figure)[round(100 * row["exact"]["rate"], 6)]
        expected = zero
        if row["trainable"]:
            logs = [math.log10(count) for count in ticks]
            expected = np.interp(math.log10(row["trainable"]), logs, [*ticks.values()])
        assert x == pytest.approx(expected)


def test_points_of_equal_size_stand_side_by_side():
    result = comparison(["lora", "pissa", "qlora"])
    for row in result["rows"]:
        row["exact"] |= {"rate": 0.5, "low": 0.4, "high": 0.6}
    places = sorted(x for x, *_ in bars(figures.quality_against_parameters(result)))
    assert np.diff(places) == pytest.approx([draw.APART] * 2)


@pytest.mark.parametrize("seed", range(20))
def test_spread_moves_least(seed):
    dice = np.random.default_rng(seed)
    places, apart = dice.uniform(0, 2, 6).round(1), 0.3
    moved = np.array(draw.spread(list(places), apart))
    assert np.diff(np.sort(moved)).min() >= apart - 1e-9

    def cost(candidate):
        return ((candidate - places) ** 2).sum()

    for _ in range(300):  # the cost is convex: what no neighbour beats is the least
        near = moved + dice.normal(0, 0.05, 6)
        order = np.argsort(moved)
        if np.diff(near[order]).min() >= apart:
            assert cost(near) >= cost(moved) - 1e-9


def test_a_method_looks_the_same_whoever_stands_beside_it():
    result = separated(comparison(tuple(METHODS), seed=2))
    whole = points(figures.quality_against_parameters(result))
    dice = random.Random(0)
    for _ in range(2):
        result["rows"] = dice.sample(result["rows"], len(result["rows"]) - 3)
        some = points(figures.quality_against_parameters(result))
        assert all(whole[rate][1:] == some[rate][1:] for rate in some)


def test_looks_are_distinct_and_petroff10():
    looks = [theme.look(key) for key in theme.LOOKS]
    assert len(set(looks)) == len(looks)
    if "petroff10" in matplotlib.style.library:
        cycle = matplotlib.style.library["petroff10"]["axes.prop_cycle"]
        assert list(theme.PALETTE) == cycle.by_key()["color"]
    colours = {colour for colour, _ in (*looks, theme.look("a new method"))}
    assert colours <= set(theme.PALETTE)


def test_memory_bars_are_the_bytes_and_the_line_is_the_peak():
    result = comparison(seed=4)
    axes = figures.memory_by_kind(result).axes[0]
    for i, row in enumerate(result["rows"]):
        drawn = {
            kind: bar.get_width()
            for kind, bar in zip(figures.KINDS, axes.patches[4 * i :], strict=False)
        }
        kinds = {kind: row["memory"][kind] / 1e6 for kind in figures.KINDS}
        assert drawn == pytest.approx(kinds)
        (line,) = axes.collections[i].get_segments()
        assert line[0][0] == pytest.approx(row["memory"]["peak"] / 1e6)


def test_a_row_without_measurements_is_left_out():
    result = comparison(seed=6)
    result["rows"][3] |= {"exact": None, "memory": None, "share": None}
    assert len(bars(figures.quality_against_parameters(result))) == 4
    assert len(figures.memory_by_kind(result).axes[0].patches) == 4 * 4


def test_titles_follow_the_data():
    result = comparison(["few-shot", "lora"])
    for row, rate in zip(result["rows"], (0.25, 0.75), strict=True):
        row["exact"]["rate"] = rate
    first = figures.quality_against_parameters(result).texts[0].get_text()
    assert "LoRA" in first and "75" in first and "25" in first
    result["rows"][0]["exact"]["rate"] = 0.875
    result["rows"][0]["exact"]["n"] = 200
    assert "87.5" in figures.quality_against_parameters(result).texts[0].get_text()


def test_svg_is_whole_reproducible_and_themed():
    result = comparison(["few-shot", "lora"])
    dark = figures.memory_by_kind(result, theme=theme.DARK)
    text = theme.svg(dark)
    again = theme.svg(figures.memory_by_kind(result, theme=theme.DARK))
    assert text == again
    ElementTree.fromstring(text)
    assert theme.DARK.paper in text and theme.LIGHT.paper not in text


def test_training_curve_shows_the_losses():
    history = History(loss=[3.0, 2.0, 1.0], validation=[(1, 2.5), (3, 1.25)])
    figure = figures.training_curve(history)
    training, validation = figure.axes[0].lines
    assert list(training.get_ydata()) == history.loss
    assert list(validation.get_xdata()) == [1, 3]
    assert "2.50" in figure.texts[0].get_text() and "1.25" in figure.texts[0].get_text()
