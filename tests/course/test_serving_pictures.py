"""Serving pictures: what was given is drawn, waste is hatched, nothing overlaps."""

import itertools

import pytest
from matplotlib.transforms import Bbox
from planting import Bug, each_is_caught, law

from peft_from_scratch.course.pictures import serving_pictures as pictures
from peft_from_scratch.course.pictures.serving_pictures import Span, Token, Use

ROWS = "abacab"
RANKS = [1, 4, 6, 33]
WAYS = {
    "in groups": [Span("x", 0, 0, 5), Span("y", 1, 0, 2), Span("x", 0, 5, 7)],
    "continuous": [Span("x", 0, 0, 5), Span("y", 1, 0, 2), Span("x", 1, 2, 4)],
}
USES = [
    Use("json", frozenset({"json"}), True),
    Use("sql", frozenset({"json", "sql"}), True),
    Use("json", frozenset({"json", "sql"}), False),
]
STRIPS = {
    "own": [Token("In", "b"), Token("put", "b"), Token("Lima", None)],
    "foreign": [Token("In", "a"), Token("put", "b"), Token("Oslo", None, True)],
}


def figures(width=7.4):
    return [
        pictures.three_ways(ROWS, width=width),
        pictures.rank_classes(RANKS, width=width),
        pictures.over_time(WAYS, title="Places over time", width=width),
        pictures.pool(USES, title="The pool", width=width),
        pictures.strips(STRIPS, title="Who read what", width=width),
    ]


def named(figure, gid):
    return [patch for patch in figure.axes[0].patches if patch.get_gid() == gid]


@law
def a_loop_has_a_pass_for_each_adapter_and_the_others_one_row_each():
    figure = pictures.three_ways(ROWS)
    assert len(named(figure, "pass")) == 3
    assert len(named(figure, "loop")) == len(named(figure, "own")) == 6
    assert len(named(figure, "product")) == 6
    assert len(named(figure, "masked")) == 6 * 2
    letters = [text.get_text() for text in figure.axes[0].texts]
    assert [t for t in letters if t in ("$A_a$", "$A_b$", "$A_c$")] == [
        f"$A_{row}$" for row in ROWS
    ]
    assert "3 passes through the model" in letters
    assert len(named(pictures.three_ways("aa"), "pass")) == 1


@law
def ranks_are_drawn_as_they_are_and_as_they_are_padded():
    figure = pictures.rank_classes(RANKS)
    widths = {
        gid: [patch.get_width() for patch in named(figure, gid)]
        for gid in ("own", "class", "largest")
    }
    assert widths == {"own": RANKS, "class": [4, 4, 8, 64], "largest": [64] * 4}
    assert figure.axes[0].get_xlim() == (0, 64)


@law
def each_request_has_its_place_and_time():
    figure = pictures.over_time(WAYS, title="t")
    spans = [span for way in WAYS.values() for span in way]
    drawn = named(figure, "span")
    assert [(p.get_x(), p.get_width()) for p in drawn] == [
        (s.start, s.stop - s.start) for s in spans
    ]
    heights = [round(patch.get_y(), 3) for patch in drawn]
    assert heights[0] == heights[2] < heights[1] < heights[3] < heights[4]
    assert heights[4] == heights[5]
    assert [patch.get_width() for patch in named(figure, "empty")] == [7, 7, 5, 5]
    assert figure.axes[0].get_xlim() == (0, 7)


@law
def what_is_in_memory_is_drawn_and_loads_are_crossed():
    figure = pictures.pool(USES, title="t")
    place = lambda patch: (round(patch.get_x() + 0.45), round(patch.get_y() + 0.4))  # noqa: E731
    assert list(map(place, named(figure, "used"))) == [(1, 0), (2, 1), (3, 0)]
    assert list(map(place, named(figure, "kept"))) == [(2, 0), (3, 1)]
    marks = [text.get_text() for text in figure.axes[0].texts]
    assert [mark for mark in marks if mark] == ["x", "x", "o"]


@law
def tokens_have_their_readers_color_and_changed_ones_an_edge():
    figure = pictures.strips(STRIPS, title="t")
    one, other = pictures.COLORS[:2]
    colors = [_hex(patch) for patch in named(figure, "token")]
    assert colors == [other, other, pictures.LIGHT.paper, one, other]
    (changed,) = named(figure, "changed")
    assert _hex(changed) == pictures.LIGHT.paper
    texts = {text.get_text(): text for text in figure.axes[0].texts}
    assert texts["Oslo"].get_zorder() > changed.get_zorder()


def _hex(patch):
    red, green, blue, _ = (round(255 * each) for each in patch.get_facecolor())
    return f"#{red:02x}{green:02x}{blue:02x}"


@law
def requests_take_the_lowest_free_place():
    got = pictures.placed([("a", 0, 5), ("b", 1, 3), ("c", 2, 4), ("d", 3, 9)])
    assert [(s.adapter, s.place) for s in got] == [
        ("a", 0),
        ("b", 1),
        ("c", 2),
        ("d", 1),
    ]


@law
def a_group_waits_for_its_longest():
    got = pictures.in_groups([("a", 2), ("b", 5), ("c", 1), ("d", 3), ("e", 1)], 2)
    assert [(s.place, s.start, s.stop) for s in got] == [
        (0, 0, 2),
        (1, 0, 5),
        (0, 5, 6),
        (1, 5, 8),
        (0, 8, 9),
    ]


@law
def what_was_served_is_shown_both_ways():
    ways = pictures.both_ways("abc", [[0, 1, 2], [1, 2], [3, 4]], rows=2)
    assert ways["Continuous batching"] == [
        Span("a", 0, 0, 3),
        Span("b", 1, 1, 3),
        Span("c", 0, 3, 5),
    ]
    assert ways["Fixed groups"] == [
        Span("a", 0, 0, 3),
        Span("b", 1, 0, 2),
        Span("c", 0, 3, 5),
    ]


@law
def words_have_their_reader_and_changes_are_marked():
    got = pictures.tokens("abc", "xy", "xz", 2, ("one", "two"))
    assert [(t.text, t.reader) for t in got[:3]] == [
        ("a", "one"),
        ("b", "one"),
        ("c", "two"),
    ]
    assert got[3:] == [Token("x", None), Token("y", None, True)]


def test_a_token_without_a_text_is_shown_as_the_end_of_a_line():
    class Tokenizer:
        def decode(self, ids):
            return [" Lima", "\n"][ids[0]]

    assert pictures.words_of(Tokenizer())([0, 1, 0]) == ["Lima", "\u21b5", "Lima"]


def test_long_rows_of_tokens_are_wrapped():
    row = [Token("word", "a")] * 40
    lines = pictures._wrapped(row, 5.0)
    assert list(itertools.chain(*lines)) == row and len(lines) > 1
    assert all(sum(map(pictures._across, line)) <= 5.0 for line in lines)


def test_nothing_overlaps():
    for figure in figures():
        figure.canvas.draw()
        texts = [*figure.texts, *figure.axes[0].texts, figure.axes[0].xaxis.label]
        boxes = [t.get_window_extent() for t in texts if t.get_text()]
        boxes += [box.get_window_extent() for box in figure.legends]
        for one, other in itertools.combinations(boxes, 2):
            shared = Bbox.intersection(one, other)
            assert shared is None or min(shared.size) < 0.5
        assert all(figure.bbox.padded(0.5).contains(*box.max) for box in boxes)


@pytest.mark.parametrize(
    "draw, reason",
    [
        (lambda: pictures.three_ways(""), "no rows"),
        (lambda: pictures.rank_classes([4, 0]), "each above 0"),
        (lambda: pictures.over_time({"a": []}, title="t"), "spans are needed"),
        (
            lambda: pictures.over_time({"a": [Span("x", 0, 0, 2)] * 2}, title="t"),
            "one request in a place at a time",
        ),
        (lambda: pictures.pool([], title="t"), "0 uses"),
        (lambda: pictures.strips({"own": []}, title="t"), "no tokens"),
    ],
)
def test_what_cannot_be_drawn_is_refused(draw, reason):
    with pytest.raises(ValueError, match=reason):
        draw()


BUGS = {
    "a pass for each row": Bug(
        pictures._loop,
        "for name in names:",
        "for name in rows:",
        a_loop_has_a_pass_for_each_adapter_and_the_others_one_row_each,
    ),
    "nothing is masked": Bug(
        pictures._masked,
        "name == row",
        "True",
        a_loop_has_a_pass_for_each_adapter_and_the_others_one_row_each,
    ),
    "the first adapter for all": Bug(
        pictures._gather,
        'f"$A_{row}$"',
        'f"$A_{rows[0]}$"',
        a_loop_has_a_pass_for_each_adapter_and_the_others_one_row_each,
    ),
    "no class": Bug(
        pictures.rank_classes,
        "padded = class_of(rank)",
        "padded = rank",
        ranks_are_drawn_as_they_are_and_as_they_are_padded,
    ),
    "all in one place": Bug(
        pictures._places,
        "0.27 * span.place",
        "0.27 * 0",
        each_request_has_its_place_and_time,
    ),
    "the end as a length": Bug(
        pictures._places,
        "span.stop - span.start",
        "span.stop",
        each_request_has_its_place_and_time,
    ),
    "a hit is a load": Bug(
        pictures._in_memory,
        "if use.loaded",
        "if not use.loaded",
        what_is_in_memory_is_drawn_and_loads_are_crossed,
    ),
    "nothing is kept": Bug(
        pictures.pool,
        "name in use.resident",
        "name == use.adapter",
        what_is_in_memory_is_drawn_and_loads_are_crossed,
    ),
    "a place is free too late": Bug(
        pictures.placed,
        "span.stop > start",
        "span.stop >= start",
        requests_take_the_lowest_free_place,
    ),
    "groups do not wait": Bug(
        pictures.in_groups,
        "start += max(",
        "start += min(",
        a_group_waits_for_its_longest,
    ),
    "the cache has a word more": Bug(
        pictures.tokens,
        "i < kept",
        "i <= kept",
        words_have_their_reader_and_changes_are_marked,
    ),
    "the last step is lost": Bug(
        pictures.both_ways,
        "own[-1] + 1",
        "own[-1]",
        what_was_served_is_shown_both_ways,
    ),
    "no edge": Bug(
        pictures._strip,
        "if token.changed",
        "if False",
        tokens_have_their_readers_color_and_changed_ones_an_edge,
    ),
}


test_a_planted_bug_is_caught = each_is_caught(BUGS)
