"""Lessons' figures: what was given is drawn, looks differ, nothing overlaps."""

import random

import numpy as np
import pytest
from figure_overlaps import assert_apart
from matplotlib.colors import to_hex
from planting import each_is_caught

from peft_from_scratch.plotting import curves, theme

KEYS = {"LoRA, all linear": "lora", "Few-shot": "few-shot"}  # a comparison's labels
NAMES = ("LoRA", "Full fine-tuning", "r = 4", "r = 8", "random labels", "A long name")
UNITS = {"x": "Steps, count", "y": "Loss, nats per token", "title": "It falls"}


def series(many: int, *, ends: bool = True, seed: int = 0) -> dict:
    dice = np.random.default_rng(seed)
    found = {}
    for label in NAMES[:many]:
        ys = dice.uniform(1, 3) + dice.normal(0, 0.2, 6).cumsum()
        spans = dice.uniform(0.05, 0.5, (2, 6))
        low, high = ys - spans[0], ys + spans[1]
        columns = (ys, low, high) if ends else (ys,)
        found[label] = list(zip(2.0 ** np.arange(6), *columns, strict=True))
    return found


def ranges(many: int, seed: int = 0) -> dict:
    dice = random.Random(seed)
    found = {}
    for label in NAMES[:many]:
        rate = dice.uniform(10, 90)
        found[label] = (10 ** dice.uniform(4, 8), rate, rate - 9, rate + 8)
    return found


def bills(many: int) -> dict:
    kinds = list(curves.HOLDERS)
    return {n: {k: (i + 1) * 1e9 for i, k in enumerate(kinds)} for n in NAMES[:many]}


def energies(seeds=(1, 2)) -> dict:
    ranks = [1, 2, 4, 8, 16, 28, 30]
    found = {}
    for label, seed in zip(("update", "random"), seeds, strict=True):
        squares = np.random.default_rng(seed).exponential(1, (3, 30)) ** (4 - seed)
        shares = np.sort(squares)[:, ::-1].cumsum(1) / squares.sum(1, keepdims=True)
        found[label] = np.sort(shares, axis=0)[:, [k - 1 for k in ranks]].tolist()
    return {"ranks": ranks, "energies": found}


def lines(axes) -> dict:
    return {line.get_label(): line for line in axes.lines if line.get_gid() != "held"}


def labels(figure) -> list:
    return [text for text in figure.texts if text.get_gid() == "label"]


def named(figure) -> list[str]:
    """What labels or the legend name."""
    texts = labels(figure) + [t for box in figure.legends for t in box.get_texts()]
    return sorted(text.get_text().replace("\n", " ") for text in texts)


@pytest.mark.parametrize("width", [4.2, 7.4])
@pytest.mark.parametrize("many", range(1, 7))
def test_nothing_overlaps_and_everything_is_named(many, width):
    for log in ("", "x"):
        figure = curves.lines(series(many), log=log, width=width, **UNITS)
        assert_apart(figure)
        assert named(figure) == sorted(NAMES[:many])
    figure = curves.points(ranges(many, seed=many), width=width, **UNITS)
    assert_apart(figure)
    assert named(figure) == sorted(NAMES[:many])
    assert_apart(curves.bars(bills(many), title="Bytes", subtitle="Of", width=width))


def test_a_spectrum_overlaps_nowhere():
    for width in (4.2, 7.4):
        assert_apart(curves.spectrum(**energies(), title="Energy", width=width))


def test_large_numbers_have_room():
    bills = {"LoRA": [(1, 1e9), (2, 3e9)], "Full fine-tuning": [(1, 2e9), (2, 4e9)]}
    figure = curves.lines(bills, **UNITS)
    assert_apart(figure)
    assert_apart(curves.points({"LoRA": (10, 3e8, 2e8, 5e8)}, **UNITS))


def test_rates_are_the_ticks_where_there_are_few():
    rates = [1e-5, 1e-4, 1e-3, 1e-2]
    figure = curves.lines({"LoRA": [(x, 1) for x in rates]}, log="x", **UNITS)
    ticks = [text.get_text() for text in figure.axes[0].get_xticklabels()]
    assert [float(text) for text in ticks] == rates


def test_lines_and_bands_are_the_data():
    given = series(4)
    axes = curves.lines(given, control=["r = 8"], **UNITS).axes[0]
    assert set(lines(axes)) == set(given)
    for (label, rows), band in zip(given.items(), axes.collections, strict=True):
        assert np.array(rows)[:, :2] == pytest.approx(lines(axes)[label].get_xydata())
        corners = {tuple(place) for place in band.get_paths()[0].vertices}
        for x, _, low, high in rows:
            assert {(x, low), (x, high)} <= corners
    assert not curves.lines(series(2, ends=False), **UNITS).axes[0].collections


def test_points_and_intervals_are_the_data():
    given = ranges(5)
    axes = curves.points(given, **UNITS).axes[0]
    for (x, y, low, high), line, bar in zip(
        given.values(), axes.lines, axes.collections, strict=True
    ):
        assert line.get_xydata().tolist() == [[x, y]]
        assert bar.get_segments()[0].tolist() == [[x, low], [x, high]]


def test_a_spectrum_is_in_percent_with_its_band():
    given = energies()
    axes = curves.spectrum(**given, title="Energy").axes[0]
    low, middle, high = np.array(given["energies"]["update"]) * 100
    drawn = lines(axes)["update"].get_xydata()
    assert drawn == pytest.approx(np.column_stack([given["ranks"], middle]))
    corners = {
        tuple(np.round(p, 6)) for p in axes.collections[0].get_paths()[0].vertices
    }
    assert {(1, round(low[0], 6)), (1, round(high[0], 6))} <= corners
    (held,) = [line for line in axes.lines if line.get_gid() == "held"]
    assert set(held.get_ydata()) == {90}
    flat = {label: rows[1] for label, rows in given["energies"].items()}
    bare = curves.spectrum(given["ranks"], flat, title="Energy", mark_at=None).axes[0]
    assert not bare.collections and len(bare.lines) == 2


def test_bars_are_the_bytes_and_say_their_sum():
    given = {
        "bf16": {"weights": 14e9, "gradients": 14e9, "optimizer": 28e9},
        "mixed": {
            "weights": 14e9,
            "gradients": 14e9,
            "master": 28e9,
            "optimizer": 56e9,
        },
    }
    axes = curves.bars(given, title="Bytes").axes[0]
    kinds = [k for k in curves.HOLDERS if k != "activations"]
    for i, row in enumerate(given.values()):
        drawn = {
            k: bar.get_width()
            for k, bar in zip(kinds, axes.patches[4 * i :], strict=False)
        }
        assert drawn == pytest.approx({k: row.get(k, 0) / 1e9 for k in kinds})
    assert [t.get_text() for t in axes.texts] == ["bf16: 56 GB", "mixed: 112 GB"]
    assert axes.get_xlabel() == "GB (10⁹ bytes)"
    assert "MB" in curves.bars({"a": {"weights": 5e6}}, title="").axes[0].get_xlabel()


def test_controls_are_grey_dashed_and_nothing_else_is():
    given = series(5)
    drawn = lines(curves.lines(given, control=["random labels"], **UNITS).axes[0])
    for label, line in drawn.items():
        grey = to_hex(line.get_color()) == theme.GREY
        assert grey == (label == "random labels") == (line.get_linestyle() == "--")


@pytest.mark.parametrize("seed", range(30))
def test_no_two_looks_are_the_same_and_methods_keep_theirs(seed):
    dice = random.Random(seed)
    names = [*theme.LOOKS, *curves.BY_LABEL, *KEYS, *NAMES]
    names += [f"r = {2**i}" for i in range(6)]
    chosen = dice.sample(sorted(set(names)), dice.randint(1, 7))
    control = dice.sample(chosen, dice.randint(0, min(2, len(chosen))))
    found = curves.marks(chosen, control, KEYS)
    assert list(found) == chosen and len(set(found.values())) == len(chosen)
    for label, mark in found.items():
        known = curves.BY_LABEL | KEYS
        key = known.get(label, label)
        rivals = [k for k in chosen if known.get(k, k) == key]
        if label in control:
            assert mark[0] == theme.GREY
        elif key in theme.LOOKS and len(rivals) == 1:
            assert mark == theme.look(key)


@pytest.mark.parametrize("draw", [curves.lines, curves.points], ids=["lines", "points"])
@pytest.mark.parametrize("axis", ["x", "y"])
@pytest.mark.parametrize("name", ["Loss", "Loss, ", ", nats", "Loss (nats)"])
def test_an_axis_without_a_unit_is_refused(draw, axis, name):
    with pytest.raises(ValueError, match=f"{axis}='.*no unit"):
        draw({"LoRA": [(1, 2, 1, 3)]}, **UNITS | {axis: name})


@pytest.mark.parametrize("rows", [[], [(1, float("nan"))], [(float("inf"), 1)]])
def test_what_cannot_be_drawn_is_refused(rows):
    with pytest.raises(ValueError, match="LoRA"):
        curves.lines({"LoRA": rows}, **UNITS)


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match="control 'chance'"):
        curves.lines(series(2), control=["chance"], **UNITS)
    with pytest.raises(ValueError, match=r"cache.*weights, gradients"):
        curves.bars({"a": {"cache": 1}}, title="Bytes")
    with pytest.raises(ValueError, match="no series"):
        curves.lines({}, **UNITS)


BUGS = {
    "colour by place": (
        curves.marks,
        "chosen[label] = look(key)",
        'chosen[label] = look("full")',
        lambda: [
            test_no_two_looks_are_the_same_and_methods_keep_theirs(s) for s in range(30)
        ],
    ),
    "a control in colour": (
        curves.marks,
        "GREY if grey else",
        "BLUE if grey else",
        test_controls_are_grey_dashed_and_nothing_else_is,
    ),
    "names over each other": (
        curves._name_ends,
        "heights = spread([y for _, y in ends], tall)",
        "heights = [y for _, y in ends]",
        lambda: [test_nothing_overlaps_and_everything_is_named(5, 7.4)],
    ),
    "ticks over each other": (
        curves._scale,
        "if box.x0 > right + 8:",
        "if True:",
        test_a_spectrum_overlaps_nowhere,
    ),
    "no room for numbers": (
        curves._scale,
        "4 - left",
        "-900 - left",
        test_large_numbers_have_room,
    ),
    "shares for percent": (
        curves.spectrum,
        "100 * share for",
        "share for",
        test_a_spectrum_is_in_percent_with_its_band,
    ),
    "bytes of another row": (
        curves.bars,
        "stack(axes, i, {k: n / size",
        "stack(axes, i, {k: n",
        test_bars_are_the_bytes_and_say_their_sum,
    ),
}


test_a_planted_bug_is_caught = each_is_caught(BUGS)
