"""The picture: each method at its place, one lit at a time, nothing overlapping."""

import re
import xml.etree.ElementTree as ElementTree
from collections import Counter
from importlib.metadata import version
from pathlib import Path

import pytest
from figure_overlaps import assert_apart
from matplotlib.colors import to_hex
from planting import each_is_caught

from peft_from_scratch.methods import METHODS, named
from peft_from_scratch.plotting import block, theme

NAMES = [method.name for method in METHODS]
ALL = (None, *NAMES)
PINS = Path(__file__).parents[2] / "constraints.txt"


def texts(figure) -> list:
    figure.canvas.draw()
    return [text for text in figure.axes[0].texts if text.get_text()]


def assert_texts_apart(figure) -> None:
    named = enumerate(texts(figure))
    boxes = {(i, t.get_text()): t.get_window_extent() for i, t in named}
    assert_apart(figure, boxes)


def inked(figure) -> list:
    """The patches of lit parts."""
    return [patch for patch in figure.axes[0].patches if patch.get_gid() == "lit"]


@pytest.mark.parametrize("lit", ALL)
@pytest.mark.parametrize("theme", [theme.LIGHT, theme.DARK], ids=["light", "dark"])
def test_nothing_overlaps(lit, theme):
    assert_texts_apart(block.block_picture(lit, theme=theme))


def test_a_letter_stands_inside_its_part():
    figure = block.block_picture()
    boxes = [patch.get_window_extent().padded(1.5) for patch in figure.axes[0].patches]
    letters = [
        t for t in texts(figure) if t.get_text() in {"A", "B", "K", "V", "b", "m"}
    ]
    said = Counter(letter.get_text() for letter in letters)
    assert said == {"A": 7, "B": 7, "m": 8, "b": 8, "K": 1, "V": 1}  # 7, and the legend
    for letter in letters:
        extent = letter.get_window_extent()
        assert any(
            box.contains(*extent.min) and box.contains(*extent.max) for box in boxes
        )


@pytest.mark.parametrize("lit", NAMES)
def test_a_lit_method_is_the_only_colour(lit):
    figure = block.block_picture(lit)
    grey = {*theme.LIGHT, "#000000"}
    patches = figure.axes[0].patches
    fills = {to_hex(patch.get_facecolor()) for patch in patches}
    assert fills - grey == {theme.look(lit)[0]}
    colours = {to_hex(line.get_color()) for line in figure.axes[0].lines}
    assert colours <= grey


# Shapes in one layer of Llama, which has 7 projections.
COUNTS = {
    "weights": 7 + 2 + 2,  # the norms, the embedding and the head, too
    "low-rank": 2 * 7,
    "four bits": 4 * 7,
    "lengths": 7,
    "biases": 7,
    "factors": 3,
    "bottlenecks": 2 * 2,
    "keys and values": 2,
    "embeddings": 3,
}


@pytest.mark.parametrize("lit", NAMES)
def test_every_part_of_a_method_is_there(lit):
    parts = named(lit).parts
    assert parts and set(parts) <= set(block.PARTS)
    assert len(inked(block.block_picture(lit))) == sum(COUNTS[part] for part in parts)


def middle(patch) -> tuple[float, float]:
    box = patch.get_extents()
    return tuple((box.min + box.max) / 2)


def page(figure, patch):
    return figure.axes[0].transData.inverted().transform(middle(patch))


def test_parts_stand_where_the_methods_act():
    """Prompt before the layer; prefix and IA3 before attention; bottlenecks between
    W_o or W_down and the sum."""
    at = {
        key: [
            page(figure, patch)
            for figure in [block.block_picture(key)]
            for patch in inked(figure)
        ]
        for key in ("prompt", "prefix", "ia3", "houlsby")
    }
    names = {t.get_text(): t.get_position() for t in texts(block.block_picture())}
    attention, first_norm = names["attention"][0], 1.38
    assert all(x < first_norm for x, _ in at["prompt"])
    assert all(names["$W_k$"][0] < x < attention for x, _ in at["prefix"])
    factors = sorted(at["ia3"], key=lambda place: place[0])
    assert [round(y, 2) for _, y in factors[:2]] == pytest.approx(
        [2.65, 1.85], abs=0.01
    )
    assert factors[2][0] < names[r"$W_{\mathrm{down}}$"][0]
    columns = sorted({round(x, 2) for x, _ in at["houlsby"]})
    assert columns[0] > names["$W_o$"][0]
    assert columns[1] > names[r"$W_{\mathrm{down}}$"][0]


def test_every_method_is_named_and_has_its_letters():
    said = {text.get_text() for text in texts(block.block_picture())}
    for method in METHODS:
        assert f"{method.label}: {method.place}" in said
        assert method.letters in said
    for method in METHODS:
        lit = {text.get_text() for text in texts(block.block_picture(method.name))}
        assert {*method.lines, f"{method.label}: {method.place}"} <= lit


def test_the_methods_are_those_that_have_a_look():
    variants = {"zero-shot", "few-shot", "lora-attention"}
    assert set(NAMES) == set(theme.LOOKS) - variants


def test_no_two_methods_look_the_same():
    looks = [theme.look(key) for key in theme.LOOKS]
    assert len(set(looks)) == len(looks)
    for method in METHODS:
        assert theme.look(method.name) == (
            theme.COLORS[method.color],
            method.marker,
        )
        assert method.marker in theme.MARKERS


def test_an_unknown_method_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match=r"lit='lorra' .* lora, dora"):
        block.block_picture("lorra")


def luminance(colour: str) -> float:
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c < 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("colour", theme.PALETTE)
def test_letters_can_be_read_on_every_colour(colour):
    low, high = sorted(map(luminance, (colour, theme.readable(colour))))
    assert (high + 0.05) / (low + 0.05) > 4


@pytest.mark.parametrize("width", [4.2, 7.4, 11])
def test_the_page_is_scaled_as_a_whole(width):
    figure = block.block_picture("lora", width=width)
    assert figure.get_figwidth() == width
    assert_texts_apart(figure)


def test_the_picture_in_words_names_what_is_lit():
    assert "LoRA: " in block.in_words("lora") and "Prefix" not in block.in_words("lora")
    assert all(m.label in block.in_words() for m in METHODS)


def test_the_shipped_file_is_what_the_code_draws():
    text = block.FILE.read_text("utf-8")
    ElementTree.fromstring(text)
    pinned = re.search(r"^matplotlib==(\S+)$", PINS.read_text(), re.MULTILINE)[1]
    if version("matplotlib") != pinned:
        pytest.skip("another matplotlib draws other paths")
    assert text == theme.svg(block.block_picture()), (
        "python -m peft_from_scratch.plotting.block"
    )


def lora_has_its_parts():
    test_every_part_of_a_method_is_there("lora")


BUGS = {
    "no B": (
        block._low_rank,
        '("B", 1)',
        '("A", 1)',
        test_a_letter_stands_inside_its_part,
    ),
    "only A": (block._low_rank, ', ("B", 1)', ",", lora_has_its_parts),
    "another's colour": (
        block.Pen.color,
        "look(self.lit)[0] if",
        'look("full")[0] if',
        lambda: test_a_lit_method_is_the_only_colour("lora"),
    ),
    "all lit": (
        block.Pen.color,
        "if self.lit in owners else None",
        "",
        lambda: (
            test_a_lit_method_is_the_only_colour("full")
            or test_every_part_of_a_method_is_there("lora")
        ),
    ),
    "a line too long": (
        block._legend,
        "{method.label}: {method.place}",
        "{method.label}: {method.place} {method.place}",
        lambda: assert_texts_apart(block.block_picture()),
    ),
    "K over V": (
        block._attention,
        "prefix = Rectangle((3.0, y + 0.16)",
        "prefix = Rectangle((3.9, y + 0.16)",
        test_parts_stand_where_the_methods_act,
    ),
}


test_a_planted_bug_is_caught = each_is_caught(BUGS)
