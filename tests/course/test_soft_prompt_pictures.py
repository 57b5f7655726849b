"""The pictures of prompts and prefixes: what was given is drawn, nothing overlaps."""

import itertools
from types import SimpleNamespace

import pytest
import torch
from figure_overlaps import assert_apart
from matplotlib.patches import Rectangle
from planting import Bug, each_is_caught, law

from peft_from_scratch.course.pictures import soft_prompt_pictures as pictures

MASK = torch.tensor([[1, 1, 1, 1], [0, 0, 1, 1]])
NUMBERS = torch.tensor([[0, 1, 2, 3, 4, 5], [0, 1, 1, 1, 2, 3]])
COSTS = (0.45, 0.02, 0.3, 0.06)
SLOPES = {
    "prefix": {"small": 0.0086, "large": 0.002},
    "prompt": {"small": 4.3e-4, "large": 6.1e-5},
}
BOUNDS = {"prefix": 0.1, "prompt": 0.01}


def patches(axes, gid=None):
    boxes = [p for p in axes.patches if isinstance(p, Rectangle)]
    return [box for box in boxes if gid is None or box.get_gid() == gid]


def said(figure):
    texts = [text.get_text() for axes in figure.axes for text in axes.texts]
    return [*texts, *(text.get_text() for text in figure.texts)]


# ------------------------------------------------------------------------ Padded rows


def rows(width=7.4):
    given = {"right": NUMBERS, "wrong": torch.arange(6).expand(2, -1)}
    return pictures.padded_rows(MASK, 2, given, title="Rows", width=width)


@law
def every_place_has_its_kind_and_its_position():
    figure = rows()
    (axes,) = figure.axes
    counts = {kind: len(patches(axes, kind)) for kind in "Px."}
    assert counts == {"P": 8, "x": 12, ".": 4}
    written = said(figure)
    for cell in ("P 0", "P 1", "x 2", "x 5", "(1)", "x 3"):
        assert cell in written
    right = written[: written.index("wrong")]
    assert "x 4" in right and written.count("(1)") == 2
    assert "2 vectors of P, 2 places of padding, 2 tokens" in written
    assert "2 vectors of P, 4 tokens" in written


@law
def padding_is_hollow():
    (axes,) = rows().axes
    fills = {
        kind: {p.get_facecolor()[:3] for p in patches(axes, kind)} for kind in "Px."
    }
    assert fills["."] == {(1, 1, 1)}
    assert all(len(fill) == 1 for fill in fills.values())
    assert len(set.union(*fills.values())) == 3


def test_positions_of_another_shape_are_refused():
    with pytest.raises(ValueError, match=r"'narrow' have shape \(2, 4\); \(2, 6\)"):
        pictures.padded_rows(MASK, 2, {"narrow": NUMBERS[:, :4]}, title="")


# ------------------------------------------------------------------- The score tables


def weights(n, t=4):
    torch.manual_seed(n)
    seen = torch.ones(t, n + t, dtype=torch.bool).tril(n)
    return torch.randn(t, n + t).masked_fill(~seen, -torch.inf).softmax(1)


def with_prefix(share=0.25, n=2):
    """(weights without, with a prefix of n that takes the same share of all)."""
    plain = weights(0)
    front = torch.full((4, n), share / n)
    return plain, torch.cat([front, (1 - share) * plain], 1)


def tables(query=2, pair=(0, 1), width=7.4):
    both = with_prefix()
    return pictures.score_tables(
        *both, query=query, pair=pair, title="Tables", width=width
    )


@law
def every_weight_that_is_seen_is_written():
    figure, (plain, wide) = tables(), with_prefix()
    (axes,) = figure.axes
    assert len(patches(axes, "weight")) == 10 + 10 + 2 * 4
    written = said(figure)
    for i, j in itertools.combinations_with_replacement(range(4), 2):
        assert f"{plain[j, i]:.2f}" in written
        assert f"{wide[j, 2 + i]:.2f}" in written
    assert [w for w in written if w in ("P1", "P2", "P3")] == ["P1", "P2"]
    assert written.count("x4") == 2


@law
def the_ratio_is_that_of_the_pair():
    figure, (plain, wide) = tables(), with_prefix()
    lines = [line for line in said(figure) if line.startswith("x1 / x2 = ")]
    ratio = f"{plain[2, 0] / plain[2, 1]:.3f}"
    assert len(lines) == 2 and all(line.endswith(ratio) for line in lines)
    assert f"{wide[2, 2]:.3f} / {wide[2, 3]:.3f}" in lines[1]
    marked = patches(figure.axes[0], "pair")
    columns = [box.get_x() for box in marked]
    assert columns[1] == columns[0] + 1 and columns[3] == columns[2] + 1
    assert columns[2] - columns[0] == pytest.approx(4 + pictures.BETWEEN + 2)
    assert {box.get_y() for box in marked} == {4}


@pytest.mark.parametrize("query, pair", [(0, (0, 1)), (2, (-1, 0)), (4, (0, 1))])
def test_a_pair_that_the_query_does_not_see_is_refused(query, pair):
    with pytest.raises(ValueError, match="does not see both"):
        tables(query, pair)


# --------------------------------------------------------------- Shares, leave one out


@law
def the_longest_length_within_the_bound_is_written():
    figure = pictures.shares(SLOPES, BOUNDS, longest=1024, title="Shares")
    assert len(figure.axes) == 2
    for axes, (method, models) in zip(figure.axes, SLOPES.items(), strict=True):
        lasts = [f"{int(BOUNDS[method] / slope)}" for slope in models.values()]
        assert [t.get_text() for t in axes.texts if t.get_text() in lasts] == lasts
        for last, slope in zip(lasts, models.values(), strict=True):
            assert int(last) * slope <= BOUNDS[method] < (int(last) + 1) * slope
        drawn = [line for line in axes.lines if line.get_gid() == "line"]
        ends = [line.get_ydata()[1] / line.get_ydata()[0] for line in drawn]
        assert ends == pytest.approx([1024, 1024])
        (bound,) = (line for line in axes.lines if line.get_gid() == "bound")
        assert bound.get_ydata()[0] == BOUNDS[method]
        assert (axes.get_xscale(), axes.get_yscale()) == ("log", "log")


def taken(width=7.4):
    return pictures.leave_one_out(COSTS, 0.6, limit=0.1, title="One", width=width)


@law
def bars_are_the_costs_and_small_ones_are_hatched():
    (axes,) = taken().axes
    bars = patches(axes)
    assert [bar.get_height() for bar in bars] == pytest.approx([*COSTS, 0.6])
    hatched = [i for i, bar in enumerate(bars) if bar.get_hatch()]
    assert hatched == [1, 3, 4]
    (limit,) = (line for line in axes.lines if line.get_gid() == "limit")
    assert limit.get_ydata()[0] == 0.1


def runs_of(trained, *losses):
    """One task's runs, a seed each."""
    results = [dict(trainable=trained, test_loss=loss) for loss in losses]
    return [SimpleNamespace(result=result) for result in results]


@law
def a_point_is_the_mean_of_tasks_and_seeds():
    cells = {"LoRA": [runs_of(80, 1.0, 2.0), runs_of(80, 3.0, 6.0)]}
    assert pictures._sizes(cells) == {"LoRA": (80, 3.0, 2.0, 4.0)}
    assert pictures.by_size_words(cells) == "LoRA: 80 trained, 3.00"
    figure = pictures.by_size(cells, title="Sizes")
    assert "LoRA" in said(figure)


@pytest.mark.parametrize("width", [6.4, 7.4])
@pytest.mark.parametrize("draw", [rows, taken, tables])
def test_nothing_overlaps(draw, width):
    assert_apart(draw(width=width))


BUGS = {
    "padding looks like a token": Bug(
        pictures.padded_rows, 'if one else "."', 'if one else "x"', padding_is_hollow
    ),
    "positions of the first row": Bug(
        pictures.padded_rows,
        "numbers[i].tolist()",
        "numbers[0].tolist()",
        every_place_has_its_kind_and_its_position,
    ),
    "the future is drawn": Bug(
        pictures._table,
        "if j > i + n:",
        "if j < 0:",
        every_weight_that_is_seen_is_written,
    ),
    "the prefix under the mask": Bug(
        pictures._table,
        "if j > i + n:",
        "if j > i:",
        every_weight_that_is_seen_is_written,
    ),
    "the ratio of the prefix": Bug(
        pictures._ratio,
        "weights[query, n + j].item()",
        "weights[query, j].item()",
        the_ratio_is_that_of_the_pair,
    ),
    "another query": Bug(
        pictures._ratio, "2 + query)", "1 + query)", the_ratio_is_that_of_the_pair
    ),
    "one position too many": Bug(
        pictures._lines,
        "int(bound / slope)",
        "int(bound / slope) + 1",
        the_longest_length_within_the_bound_is_written,
    ),
    "the larger ones are hatched": Bug(
        pictures.leave_one_out,
        "cost <= limit",
        "cost > limit",
        bars_are_the_costs_and_small_ones_are_hatched,
    ),
    "the first task alone": Bug(
        pictures._sizes,
        "zip(*tasks, strict=True)",
        "zip(*tasks[:1], strict=True)",
        a_point_is_the_mean_of_tasks_and_seeds,
    ),
}


test_a_planted_bug_is_caught = each_is_caught(BUGS)
