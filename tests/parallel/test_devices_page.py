"""docs/many_devices.md: its tables are computed, and its commands are ones that run."""

import re
import shlex

import pytest

from peft_from_scratch.cli.command_line import parser
from peft_from_scratch.memory.budget import bill
from peft_from_scratch.memory.setups import Setup
from tools import devices_page
from tools.memory_cells import SEVEN

TEXT = devices_page.PAGE.read_text("utf-8")


def test_the_page_has_what_is_computed():
    assert devices_page.page(TEXT) == TEXT


def test_the_commands_of_the_page_are_ones_of_the_command_line():
    plain = TEXT.replace("\\\n", " ").replace("$SLURM_ARRAY_TASK_ID", "3")
    commands = re.findall(r"-m peft_from_scratch (.*)", plain)
    assert len(commands) == 6
    for command in commands:
        options = parser().parse_args(shlex.split(command))
        assert options.name in ("train", "ledger")


@pytest.mark.parametrize("stage, expected", [(1, 2 * 2), (2, 2 * 2), (3, 3 * 2)])
def test_full_fine_tuning_sends_what_the_paper_says(stage, expected):
    """2 Ψ values in stages 1 and 2, 3 Ψ in stage 3, of 2 bytes, times (N - 1) / N."""
    setup = Setup(method="full", zero=stage, ranks=64)
    predicted = bill(SEVEN, setup)
    values = predicted.weighed.total * 63 / 64
    assert devices_page.sent(setup, predicted) / values == pytest.approx(expected)
