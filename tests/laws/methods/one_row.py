"""A law of the contract on one method and one architecture."""

from functools import partial

from laws.methods.table import METHODS

ROWS = {row.name: row for row in METHODS}


def contract(law, row="lora", architecture="llama"):
    return partial(law, ROWS.get(row, row), architecture)
