"""The table and the page hold the result's numbers, and nothing slips into them."""

import base64
import copy
import json
import math
import re
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser

import pytest
from invented_comparisons import METHODS, comparison

from peft_from_scratch.comparison import apart, background, figures, findings, report
from peft_from_scratch.comparison.columns import COLUMNS, percent, significant

HOSTILE = (
    "</pre><script>alert(1)</script><img src=x onerror=alert(2)>{{ 7 * 7 }}\"'&\0\u202e"
)


def numbers(row: dict) -> list[float | str | None]:
    """What the row's cells must say, in the table's order, by our own arithmetic."""
    exact, against = row["exact"], row["against"]
    memory, decode = row["memory"], row["decode"]
    over = []
    for reference in ("zero-shot", "few-shot"):
        paired = against.get(reference)
        ends = ("difference", "low", "high")
        over += [100 * paired[e] for e in ends] if paired else [None]
    return [
        *(100 * exact[end] for end in ("rate", "low", "high")),
        row["letters"],
        *over,
        row["forgetting"]["change"],
        100 * row["trainable"] / row["total"],
        row["steps"],
        row["seconds"]["train"],
        row["seconds"]["answer"],
        row["disk_bytes"] / 1e6,
        decode["ratio"],
        decode["low"],
        decode["high"],
        decode["merged"]["ratio"],
        "yes",
        row["merge"]["logit_error"],
        *(memory[kind] / 1e6 for kind in ("weights", "gradients", "optimizer")),
        memory["activations"] / 1e6,
        memory["peak"] / 1e6,
    ]


def agree(cells: str, expected: list[float | str | None]) -> bool:
    """Whether the cells say just these values, each right to its last digit."""
    tokens = re.findall(r"[-−+]?\d[\d,]*\.?\d*|—|[a-z]+", cells)
    return len(tokens) == len(expected) and all(map(says, tokens, expected))


def says(token: str, value: float | str | None) -> bool:
    if value is None or isinstance(value, str):
        return token == (value or "—")
    shown = token.replace(",", "").replace("−", "-")
    decimals = len(shown.partition(".")[2])
    return abs(float(shown) - value) <= 0.5001 * 10**-decimals


class Outline(HTMLParser):
    """A page as its tags with their attributes, and its text."""

    def __init__(self, page: str):
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, dict]] = []
        self.text: list[str] = []
        self.tables: list[list[list[str]]] = []  # of rows of cells
        self.captions: list[str] = []
        self.inside = ""  # a cell or a caption
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag == "table":
            self.tables.append([])
        if tag == "tr":
            self.tables[-1].append([])
        if tag in ("td", "th"):
            self.tables[-1][-1].append("")
        if tag == "caption":
            self.captions.append("")
        if tag in ("td", "th", "caption"):
            self.inside = tag

    def handle_endtag(self, tag):
        self.inside = "" if tag == self.inside else self.inside

    def handle_data(self, data):
        self.text.append(data)
        if self.inside == "caption":
            self.captions[-1] += data
        elif self.inside:
            self.tables[-1][-1][-1] += f"{data} "

    def table(self, caption: str) -> dict[str, list[str]]:
        """{first cell: the other cells} of the rows of one table."""
        (place,) = (i for i, c in enumerate(self.captions) if c.startswith(caption))
        return {first.strip(): cells for first, *cells in self.tables[place]}

    def every(self, attribute: str) -> list[str]:
        return [held[attribute] for _, held in self.tags if attribute in held]


@pytest.fixture
def without_pictures(monkeypatch):
    """Pages without their figures, which take most of the time."""
    names = ("alt", "light_wide", "light_narrow", "dark_wide", "dark_narrow")
    blank = dict.fromkeys(names, "data:,")
    monkeypatch.setattr(report, "_pictures", lambda result: [blank, blank])


@pytest.mark.parametrize("width", [80, 100, 120, 200])
@pytest.mark.parametrize("many", [2, 5, 15])
def test_table_holds_every_number_of_the_result(many, width):
    result = comparison(tuple(METHODS)[:many], seed=many)
    text = report.table(result, width)
    lines = text.partition("\n\nAgainst")[0].splitlines()
    for row in result["rows"]:
        start = row["label"][:26].rsplit(" ", len(row["label"]) > 26)[0]
        own = [
            line.removeprefix(start) for line in lines if line.startswith(start + "  ")
        ]
        assert agree(" ".join(own), numbers(row)), row["label"]


@pytest.mark.parametrize("width", [80, 100, 120])
def test_table_fits_and_names_each_column_once_with_its_unit(width):
    text = report.table(comparison(tuple(METHODS), seed=1), width)
    assert max(map(len, text.splitlines()[1:])) <= width
    table = text.partition("Against few-shot prompting\n")[0]
    for column in COLUMNS:
        assert len(re.findall(rf"  {column.name}\b", table)) == 1
    assert table.count(" MB") == sum(column.unit == "MB" for column in COLUMNS)


def test_groups_stay_together_at_100_characters():
    table = report.table(comparison(), 100)
    for group in {column.group for column in COLUMNS}:
        (line,) = (
            i for i, text in enumerate(table.splitlines()) if f" {group} ─" in text
        )
        names = [column.name for column in COLUMNS if column.group == group]
        assert all(name in table.splitlines()[line + 1] for name in names)


def test_page_tables_hold_every_number_and_say_what_is_what(without_pictures):
    result = comparison(seed=8)
    outline = Outline(report.page(result))
    groups = [outline.table(group) for group in dict.fromkeys(c.group for c in COLUMNS)]
    for row in result["rows"]:
        cells = [cell for group in groups for cell in group[row["label"]]]
        assert agree(" ".join(cells), numbers(row)), row["label"]
        assert len(cells) == len(COLUMNS)
    heads = [given for tag, given in outline.tags if tag == "th"]
    assert all(given["scope"] in ("row", "col") for given in heads)
    assert len(outline.captions) == len(outline.tables)


def test_the_first_table_has_three_columns_and_the_matrix_every_pair(without_pictures):
    result = comparison(seed=8, seeds=2)
    outline = Outline(report.page(result))
    first, matrix = outline.table("What a method reaches"), outline.table("Points")
    labels = [row["label"] for row in result["rows"]]
    assert list(first)[1:] == list(matrix)[1:] == labels
    for row in result["rows"]:
        exact = [100 * row["exact"][end] for end in ("rate", "low", "high")]
        exact.insert(1, row["letters"])
        training = [row["seconds"]["train"], row["memory"]["peak"] / 1e6]
        answering = [row["seconds"]["answer"], row["decode"]["ratio"]]
        cells = first[row["label"]]
        assert agree(cells[0], exact) and agree(cells[2], answering)
        assert agree(cells[1].removesuffix("MB "), training) or not row["trainable"]
        for other, cell in zip(result["rows"], matrix[row["label"]], strict=True):
            compared = apart.pair(result, row["key"], other["key"])
            if other is row:
                assert not cell
                continue
            ends = [100 * compared[end] for end in ("difference", "low", "high")]
            assert agree(cell, ends) and ("*" in cell) == compared["apart"]


def test_the_page_is_folded_below_its_first_screen(without_pictures):
    """Without the folded parts: a heading, a picture, one table of three columns."""
    page = report.page(comparison())
    unfolded = Outline(re.sub(r"<details>.*?</details>", "", page, flags=re.DOTALL))
    tags = [tag for tag, _ in unfolded.tags]
    assert (tags.count("h1"), tags.count("img"), tags.count("table")) == (1, 1, 1)
    assert len(unfolded.tables[0][0]) == 4
    assert tags.count("h2") == 0 and page.count("<summary><h2") >= 8


@pytest.mark.parametrize("recorded", [True, False])
def test_times_stand_with_dtype_cores_and_load(recorded, without_pictures):
    result = comparison()
    if not recorded:
        del result["machine"]
        result["provenance"]["machine"] = "an invented one, 2 cores"
    words = "float32 on an invented one, 2 cores, 2 threads; load of other programs "
    words += "0.1 cores at most." if recorded else "not recorded."
    assert words in report.page(result) and words in " ".join(
        report.table(result, 100).split()
    )
    result["provenance"] = {}
    if not recorded:
        assert "cpu, cores not recorded, threads not recorded" in report.page(result)


def test_a_score_between_right_and_wrong_is_a_number(without_pictures):
    result = comparison(["few-shot", "lora"])
    result["data"] = {
        "file": "x.jsonl",
        "rows": {"test": 100},
        "scorer": "rouge-l",
        "title": "ROUGE-L",
        "meaning": "How much of the wording agrees.",
        "notes": ["A note on the rows."],
    }
    for row in result["rows"]:
        row["samples"][0]["correct"] = 0.4321
    page = report.page(result)
    assert "0.43" in page and "ROUGE-L" in page and "Exact match" not in page
    assert "ROUGE-L" in report.table(result, 100)
    assert "How much of the wording agrees." in page and "A note on the rows." in page


def test_hostile_text_stays_text(without_pictures):
    tame, hostile = comparison(), comparison()
    for result, text in ((tame, "harmless"), (hostile, HOSTILE)):
        result["instruction"] = result["wall"]["sentence"] = text
        result["provenance"]["machine"] = result["command"] = text
        for row in result["rows"]:
            row["label"] += text
            row["settings"]["template"] = row["merge"]["reason"] = text
            for sample in row["samples"]:
                for part in ("prompt", "expected", "answer"):
                    sample[part] += text
    page = report.page(hostile)
    assert [t for t, _ in Outline(page).tags] == [
        t for t, _ in Outline(report.page(tame)).tags
    ]
    assert "alert(1)" in "".join(Outline(page).text) and "{{ 7 * 7 }}" in page
    assert "\0" not in page and "\u202e" not in page


def test_page_loads_nothing(tmp_path):
    page = report.write(comparison(), tmp_path)[2].read_text(encoding="utf-8")
    outline = Outline(page)
    loaded = outline.every("src") + outline.every("srcset")
    assert len(loaded) == 8 and all(uri.startswith("data:image/svg") for uri in loaded)
    assert not outline.every("href") and "url(" not in page and "@import" not in page
    assert {"script", "link", "iframe", "form"}.isdisjoint(t for t, _ in outline.tags)
    assert "default-src 'none'" in page
    for uri in loaded:
        svg = ElementTree.fromstring(base64.b64decode(uri.partition(",")[2]))
        links = [v for e in svg.iter() for n, v in e.items() if n.endswith("href")]
        assert links and all(link.startswith("#") for link in links)
        assert not list(svg.iter("{http://www.w3.org/2000/svg}script"))


def test_pictures_are_described_in_words():
    result = comparison(["few-shot", "lora"], seed=3)
    quality, memory = Outline(report.page(result)).every("alt")
    for row in result["rows"]:
        assert row["label"] in quality and row["label"] in memory
        assert f"{100 * row['exact']['rate']:.0f} [" in quality
        assert f"{row['trainable']:,} parameters" in quality
        assert f"{row['memory']['peak'] / 1e6:,.0f} MB" in memory


def test_each_method_answers_each_sampled_row(without_pictures):
    result = comparison()
    shown = report.sample_answers(result)
    for row in result["rows"]:
        for sample in row["samples"]:
            (block,) = (b for b in shown if b["prompt"] == sample["prompt"])
            assert row["label"] in block["given"][sample["answer"], sample["correct"]]
    text = "".join(Outline(report.page(result)).text)
    assert text.count("✓ right") == 1 and text.count("✗ wrong") == len(result["rows"])


@pytest.mark.parametrize("field", [*comparison()["rows"][3]][2:])
def test_a_missing_value_is_a_dash(field, without_pictures):
    result = comparison(seed=2)
    whole = report.table(result, 120)
    result["rows"][3][field] = None
    table = report.table(result, 120)
    report.page(result)
    shown = field not in ("total", "batch", "samples", "settings_from", "per_seed")
    shown &= field not in ("settings", "trainable", "tried")
    assert (table.count("—") > whole.count("—")) == shown
    del result["rows"][3][field]
    assert report.table(result, 120) == table


def leaves() -> list[tuple[str, str]]:
    row = comparison()["rows"][3]
    nested = {name: held for name, held in row.items() if isinstance(held, dict)}
    return [(name, leaf) for name, held in nested.items() for leaf in held]


@pytest.mark.parametrize(("field", "leaf"), leaves())
def test_a_missing_part_breaks_nothing(field, leaf, without_pictures):
    result = comparison(seed=2)
    result["rows"][3][field][leaf] = None
    assert "None" not in report.table(result, 120)
    report.page(result)
    if field in ("exact", "memory"):
        figures.quality_against_parameters(result)
        figures.memory_by_kind(result)


def test_less_of_everything_still_reports(without_pictures):
    result = comparison(["lora"])
    for optional in ("wall", "tuned"):
        del result[optional]
    result["provenance"] = {}
    result["rows"][0]["forgetting"]["change"] = math.nan
    assert "nan" in report.table(result, 80)
    assert "Few-shot prompting was not among the rows" in report.page(result)


@pytest.mark.parametrize(
    ("intervals", "sentence"),
    [
        (
            {"full": 0.2, "lora-attention": 0.2, "lora": 0.3},
            "All three fine-tuned methods beat few-shot prompting; "
            "the smallest of them trains 0.69 % of the parameters",
        ),
        (
            {"full": 0.2, "lora-attention": 0.05, "lora": 0.3},
            "Two of three fine-tuned methods beat few-shot prompting; "
            "the smallest of them trains 1.8 % of the parameters",
        ),
        (
            {"full": 0.2, "lora": 0.3},
            "Both fine-tuned methods beat few-shot prompting; "
            "the smallest of them trains 1.8 % of the parameters",
        ),
        (
            {"full": -0.2, "lora": 0.3},
            "LoRA on all linear layers beats few-shot prompting by training 1.8 % of "
            "the parameters; the other one does not",
        ),
        (
            {"full": 0.05, "lora": -0.3},
            "No fine-tuned method is shown to beat few-shot prompting here",
        ),
    ],
)
def test_headline_says_what_the_pairs_say(intervals, sentence):
    result = comparison(["few-shot", *intervals])
    decided(result, {k: (d - 0.1, d + 0.1) for k, d in intervals.items()})
    assert findings.headline(result) == sentence


def decided(result: dict, ends: dict, *, by_holm: bool = True) -> None:
    """Give the pairs with few-shot these ends, and tell them apart where they say."""
    for pair in result["pairs"]:
        if pair["of"] == "few-shot":
            low, high = ends[pair["over"]]
            pair["difference"] = -(low + high) / 2
            pair["low"], pair["high"] = -high, -low
            pair["apart"] = by_holm and (low > 0 or high < 0)


def test_an_older_result_is_decided_by_its_intervals():
    result = comparison(["few-shot", "lora"])
    del result["pairs"]
    result["rows"][1]["against"]["few-shot"] = dict(difference=0.2, low=0.1, high=0.3)
    assert findings.headline(result).startswith("LoRA on all linear layers beats")
    result["rows"][1]["against"]["few-shot"] = dict(difference=0.2, low=-0.1, high=0.5)
    assert findings.headline(result).startswith("No fine-tuned method is shown")
    assert background.resolution(result) == []
    report.page(result)


@pytest.mark.parametrize(
    ("low", "high", "words"),
    [
        (0.01, 0.2, ("beats few-shot", "excludes zero")),
        (0.0, 0.2, ("is not told apart", "includes zero")),
        (-0.2, 0.0, ("is not told apart", "includes zero")),
        (-0.2, -0.01, ("does worse than few-shot", "excludes zero")),
    ],
)
def test_verdict_is_that_of_the_pair(low, high, words):
    result = comparison(["few-shot", "lora"])
    decided(result, {"lora": (low, high)})
    (verdict,) = findings.verdicts(result)
    assert all(word in verdict for word in words)
    signed = [f"{100 * end:+.0f}" if end else "0" for end in (low, high)]
    assert " to ".join(signed) in verdict
    assert "chance" not in verdict


def test_an_interval_without_zero_may_be_chance():
    """Among many pairs, the letters decide, and the sentence says why."""
    result = comparison(["few-shot", "lora", "full"])
    decided(result, {"lora": (0.01, 0.2), "full": (0.01, 0.2)}, by_holm=False)
    for verdict in findings.verdicts(result):
        assert "is not told apart" in verdict and "excludes zero" in verdict
        assert verdict.endswith("With 3 pairs, that can be chance.")


def test_the_text_says_what_the_reader_must_know():
    result = comparison()
    text = " ".join(report.table(result, 100).split())
    assert result["wall"]["sentence"] in text
    for words in ("undecided, not equal", "Holm", "answering one batch", "one seed"):
        assert words in text
    assert "learning rate 0.001; 50 steps of 8 rows; searched for lora" in text
    assert "by learning rate: 0.0005: 50 %, 0.001: 61 %, 0.002: 60 %." in text
    several = " ".join(report.table(comparison(seeds=3), 100).split())
    assert "mean over 3 seeds" in several and "count test rows and seeds" in several


def test_the_run_says_which_differences_it_can_tell():
    """By the pairs of fine-tuned methods; and what a longer run would change."""
    result = comparison(["zero-shot", "lora", "full", "prompt"])
    for pair, least in zip(
        result["pairs"], (0.9, 0.9, 0.9, 0.1, 0.2, 0.4), strict=True
    ):
        pair["least"] = least
    tells, seeds, more = background.resolution(result)
    assert "1 seed, 100 test rows" in tells and "about 20 points or more" in tells
    assert "another seed" in seeds
    assert "SEEDS=3 ROWS=300" in more and "about 12 points" in more  # 20 / √3
    shared = background.resolution(result | {"clusters_tested": 60})[2]
    assert "smaller differences, and measures what seeds change" in shared
    result["data"] = {"rows": {"test": 150}}
    assert "SEEDS=3 ROWS=150, about 16 points" in background.resolution(result)[2]
    result["data"]["rows"]["test"] = 100  # all of them were answered
    assert background.resolution(result)[2] == "SEEDS=3 measures what seeds change."
    result |= {"seeds": [0, 1, 2], "rows_tested": 300, "data": None}
    assert len(background.resolution(result)) == 1
    result["rows_tested"] = 200
    assert "smaller differences" in background.resolution(result)[1]
    for pair in result["pairs"]:
        pair["least"] = 1.2
    assert "too short" in background.resolution(result)[0]


def test_the_page_says_how_many_clusters_its_rows_are():
    result = comparison(["few-shot", "lora"])
    alone = [result, result | {"clusters_tested": 100}]
    assert not any("cluster" in line for r in alone for line in background.certainty(r))
    words = " ".join(background.certainty(result | {"clusters_tested": 60}))
    assert "count such rows as one: the 100 rows are 60 clusters." in words


def test_several_seeds_show_a_digit_more():
    result = comparison(["few-shot", "lora"])
    exact = result["rows"][1]["exact"]
    exact |= {"k": 87 + 2 / 3, "rate": 0.87 + 2 / 300}
    assert " 88 [" in report.table(result, 100)
    result["rows"][1]["per_seed"] = [87, 88, 88]
    assert " 87.7 [" in report.table(result, 100)


@pytest.mark.parametrize("share", [0.0, -0.0, 0.001, -0.001])
def test_a_difference_that_rounds_to_zero_has_no_sign(share):
    assert percent({"exact": {"n": 100}}, share, "+") == "0"
    assert percent({"exact": {"n": 100}}, 0.011, "+") == "+1"


@pytest.mark.parametrize("many", [10, 11])
def test_a_wide_matrix_has_no_brackets(many, without_pictures):
    page = report.page(comparison(tuple(METHODS)[:many]))
    (matrix,) = re.findall(r"<caption>Points.*?</table>", page, re.DOTALL)
    assert ("[" in matrix) == (many == 10)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (0.00321, "0.0032"),
        (1e-7, "0.00000010"),
        (-0.5, "-0.50"),
        (9.79, "9.8"),
        (99.6, "100"),
        (2852.2, "2,852"),
        (math.nan, "nan"),
        (None, "—"),
    ],
)
def test_significant(value, text):
    assert significant(value) == text


def test_write_writes_three_whole_files_twice_the_same(tmp_path):
    result = comparison(["few-shot", "lora"])
    before = copy.deepcopy(result)
    paths = report.write(result, tmp_path / "out")
    assert [path.name for path in paths] == [
        f"compare.{k}" for k in ("json", "png", "html")
    ]
    assert json.loads(paths[0].read_text(encoding="utf-8")) == before == result
    assert paths[1].read_bytes().startswith(b"\x89PNG")
    contents = [path.read_bytes() for path in paths]
    report.write(result, tmp_path / "out")
    assert [path.read_bytes() for path in paths] == contents
    assert sorted((tmp_path / "out").iterdir()) == sorted(paths)


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_text_has_contrast(theme, without_pictures):
    """WCAG 2.1 AA: 4.5 between any text and what it stands on."""
    page = report.page(comparison(["few-shot", "lora"]))
    styles = re.findall(r":root \{(.*?)\}", page, re.DOTALL)
    colours = dict(re.findall(r"--(\w+): (#\w{6})", styles[theme == "dark"]))
    for text in ("ink", "muted", "right", "wrong"):
        for ground in ("paper", "tint"):
            bright, dim = sorted(map(luminance, (colours[text], colours[ground])))[::-1]
            assert (bright + 0.05) / (dim + 0.05) >= 4.5, (text, ground)


def luminance(colour: str) -> float:
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [
        p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts
    ]
    return sum(w * p for w, p in zip((0.2126, 0.7152, 0.0722), linear, strict=True))
