"""Bytes as text: what each place prints, at the edges of its form."""

import math

from peft_from_scratch.cli import doctor
from peft_from_scratch.common.units import gigabytes, megabytes
from peft_from_scratch.comparison import columns
from peft_from_scratch.course import cards


def test_bytes_are_decimal_and_without_their_unit():
    assert gigabytes(16_533_000_000) == "16.5" and gigabytes(0) == "0.0"
    assert gigabytes(123_456_789, ".2g") == "0.12"
    assert megabytes(1_250_000) == "1.2" and megabytes(1 << 20, ".2f") == "1.05"


def test_each_place_keeps_its_own_digits():
    assert cards.gigabytes(123_456_789) == "0.12 GB"
    assert cards.gigabytes(16_533_000_000) == "16.5 GB"
    assert doctor.gigabytes(16_533_000_000) == "17 GB"
    assert doctor.gigabytes(math.nan) == "unknown memory"
    assert columns.megabytes(2_852_100_000) == "2,852"
    assert columns.megabytes(None) == columns.ABSENT
