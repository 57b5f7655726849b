"""Pictures of storage: bits as they are stored, and nothing overlaps."""

import pytest
import torch
from figure_overlaps import assert_apart
from planting import assert_caught

from peft_from_scratch import nf4
from peft_from_scratch.course.pictures import storage_pictures as pictures

ROWS = {
    "16-bit weights": {"weights as numbers": 16},
    "NF4": {"codes": 4, "constants": 0.125, "scales of the constants": 0.002},
}


def words(figure) -> list[str]:
    return [text.get_text() for text in figure.axes[0].texts]


def a_byte_is_what_pack_makes():
    for first, second in ((9, 3), (0, 15), (15, 0)):
        figure = pictures.byte(first, second)
        codes = torch.tensor([first, second], dtype=torch.uint8)
        whole = nf4.spec.pack(codes).item()
        texts = figure.axes[0].texts
        bits = [t for t in texts if t.get_text() in "01" and t.get_position()[1] < 2]
        assert "".join(bit.get_text() for bit in bits) == f"{whole:08b}"
        assert sum(text.endswith(f" = {whole}") for text in words(figure)) == 1


def levels_hold_what_the_library_holds():
    for n in (2**16, 1000):
        rows = pictures.level_rows(n)
        bits = sum(count * each for _, count, each in rows)
        assert bits == 8 * nf4.quantize(torch.ones(n)).nbytes
        text = " ".join(words(pictures.levels(n)))
        assert all(f"{count:,} × {each} bits" in text for _, count, each in rows)


def bars_are_as_long_as_the_bits():
    axes = pictures.bit_bars(ROWS, title="Bits").axes[0]
    ends = [
        max(bar.get_x() + bar.get_width() for bar in parts)
        for parts in zip(*axes.containers[: len(pictures.PARTS)], strict=True)
    ]
    assert max(ends) == 16
    nf4_bars = [bar for parts in axes.containers for bar in parts if bar.get_y() > 0.5]
    assert max(b.get_x() + b.get_width() for b in nf4_bars) == pytest.approx(4.127)
    assert "NF4: 4.127 bits" in words(axes.figure)


LAWS = (
    a_byte_is_what_pack_makes,
    levels_hold_what_the_library_holds,
    bars_are_as_long_as_the_bits,
)


@pytest.mark.parametrize("law", LAWS, ids=lambda law: law.__name__)
def test_pictures_of_storage(law):
    law()


@pytest.mark.parametrize(
    "function, right, wrong, law",
    [
        (pictures.byte, "16 * first + second", "15 * first + second", LAWS[0]),
        (pictures.level_rows, "-(-blocks // GROUP)", "blocks // GROUP", LAWS[1]),
        (pictures.bit_bars, "dict(row)", "{}", LAWS[2]),
    ],
)
def test_bugs_are_caught(function, right, wrong, law):
    assert_caught(function, right, wrong, law)


@pytest.mark.parametrize("width", [6.8, 7.4])
def test_nothing_overlaps(width):
    assert_apart(pictures.byte(9, 3, width=width))
    assert_apart(pictures.levels(2**16, width=width))
    assert_apart(pictures.bit_bars(ROWS, title="Bits", width=width))


def test_what_cannot_be_drawn_is_refused():
    with pytest.raises(ValueError, match="from 0 to 15"):
        pictures.byte(16, 0)
    with pytest.raises(ValueError, match="a part"):
        pictures.bit_bars({"NF4": {"a part": 4}}, title="Bits")
    with pytest.raises(ValueError, match="no rows"):
        pictures.bit_bars({}, title="Bits")
