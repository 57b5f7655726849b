"""The README shows the shipped run's figures, and nothing typed."""

import json

from tools import readme


def test_the_table_is_that_of_the_shipped_run():
    page = readme.PAGE.read_text("utf-8")
    assert readme.BLOCK.search(page)
    assert (
        readme.with_results(page, json.loads(readme.RESULT.read_text("utf-8"))) == page
    )


def test_a_typed_figure_is_noticed():
    result = json.loads(readme.RESULT.read_text("utf-8"))
    shown = readme.results(result)
    row = result["rows"][-1]
    row["exact"]["rate"] -= 0.01
    assert readme.results(result) != shown
