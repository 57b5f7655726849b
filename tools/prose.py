"""How long the sentences of our prose are, and how many of them have no verb.

    python -m tools.prose                     all markdown of this folder
    python -m tools.prose README.md docs      some of it
    python -m tools.prose --at REVISION       as it was at a revision of git

A measure to look at, and no limit. Many short sentences, and many without a verb, read
like notes. A sentence has a verb if it holds one of a list of common verbs and their
forms: so the share without is a little too high, everywhere alike. Code, equations,
tables, headings, addresses of links, and the fixed forms of exercises and quizzes are
left out. Of a notebook, its text form counts.
"""

import argparse
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
FOLDERS = ("README.md", "NOTATION.md", "CONTRIBUTING.md", "docs", "notebooks", "data")
SHORT = 7  # words
FIXED = re.compile(r"(No|Right)\.$|Difficulty \w+ of five|Only ten minutes\?$")
IRREGULAR = """
am are be been being is was were isn't aren't wasn't weren't has have had having
hasn't haven't do does did done doing don't doesn't didn't can can't cannot could
couldn't may might must shall should shouldn't will won't would wouldn't let's it's
that's there's you'll we'll they'll i'm we're you're they're beat beats became
become becomes began begins begun bears bore bought brings brought built came chose
chosen cost costs cut cuts deals drawn draws drew drives eats fall falls fed feeds
feel feels fell felt find finds fits found gave get gets give given gives go goes
gone got grew grow grown grows held hit hits hold holds keep keeps kept knew know
known knows lay lead leads leave leaves led left lend lends lent lets lie lies lose
loses lost made make makes making mean means meant met pay pays put puts ran read
reads run runs said saw say says see seen sees sell send sends sent set sets shown
shrank shrinks sit sits sold spend spent split splits spread spreads stand stands
stood sum sums take taken takes taught teach teaches tell tells think thinks thought
threw thrown throws told took trains understand understood went win wins won write
writes written wrote
""".split()
REGULAR = """
accept act add agree allow answer appear apply approach argue arrive ask assert
assume average avoid belong break calculate call cancel cast change check choose
claim combine come compare compile compute confirm consist contain continue
contradict control copy correct count cover create decide declare define demand
depend derive describe differ divide download drop end enter equal estimate exist
expect explain export fail fetch fill fix fold follow force forget freeze guess
happen help hide hint ignore imply import improve include increase inherit
initialize inject insert install judge learn limit list load look lower match matter
measure mend mention merge miss move multiply name need note number occur offer open
own pack pass permit place plan play plot point predict print prove publish quantize
raise rank recommend record reduce refer refuse remain remember remove repeat
replace report represent require reset respond rest return reuse round save scale
score search seem select separate serve share ship show sign skip solve sort sound
speak start state stay stop store stream stretch subtract suffer suggest support
survive swap test trace train transform transpose travel treat trust try tune turn
type update use vanish vary wait want warn watch weigh wonder work wrap yield
""".split()


def _forms(verb: str) -> set[str]:
    stem = verb[:-1] if verb.endswith("e") else verb
    if re.search(r"[^aeiou]y$", verb):
        return {verb, verb[:-1] + "ies", verb[:-1] + "ied", verb + "ing"}
    doubled = (
        verb + verb[-1] if re.search(r"[^aeiou][aeiou][bdgmnprt]$", verb) else stem
    )
    plural = verb + ("es" if re.search(r"(s|x|ch|sh)$", verb) else "s")
    return {verb, plural, stem + "ed", stem + "ing", doubled + "ed", doubled + "ing"}


VERBS = set(IRREGULAR).union(*map(_forms, REGULAR))


class Measure(NamedTuple):
    """Of a text's sentences: how many, and what they are like."""

    sentences: int
    median: float  # words
    short: float  # share of them with SHORT words or fewer
    verbless: float  # share of them without a verb of the list

    def __str__(self):
        return (
            f"{self.sentences:5} sentences, median {self.median:4.1f} words, "
            f"{100 * self.short:3.0f} % of {SHORT} words or fewer, "
            f"{100 * self.verbless:3.0f} % without a verb"
        )


def sentences(markdown: str) -> list[str]:
    """The sentences of a markdown text, without what is not prose."""
    text = re.sub(r"^---\n.*?\n---\n|^```.*?^```", "", markdown, flags=re.M | re.S)
    text = re.sub(r"\$\$.*?\$\$", " ", text, flags=re.S)
    text = re.sub(r"^\s*(#+ .*|\|.*|!\[.*|<.*>)$", "", text, flags=re.M)
    text = re.sub(r"`[^`]*`|\$[^$]*\$", "X", text)
    text = re.sub(r"\[([^][]*)\]\([^)]*\)|<[^>]*>", r"\1", text)
    text = re.sub(r"^\s*(?:[-*]|\d+\.)\s+", "\n\n", text, flags=re.M)
    pieces = []
    for paragraph in re.split(r"\n\s*\n", text.replace("*", "")):
        line = " ".join(paragraph.split())
        pieces += re.split(r"(?<=[.!?])[\"')]*\s+(?=[\"'(]*[A-Z])", line)
    return [s for s in pieces if re.search(r"[A-Za-z]{2}", s) and not FIXED.match(s)]


def measure(texts: list[str]) -> Measure:
    lengths = [len(s.split()) for s in texts]
    verbless = [not VERBS & set(re.findall(r"[a-z']+", s.lower())) for s in texts]
    n = len(texts) or 1
    short = sum(length <= SHORT for length in lengths) / n
    return Measure(len(texts), median(lengths or [0]), short, sum(verbless) / n)


def of_notebook(text: str) -> str:
    """The markdown of a notebook in jupytext's percent format."""
    cells = re.split(r"^# %%(.*)$", text, flags=re.M)[1:]
    shown = [
        c for kind, c in zip(cells[::2], cells[1::2], strict=True) if "markdown" in kind
    ]
    return "\n\n".join(re.sub(r"^# ?", "", cell, flags=re.M) for cell in shown)


def texts(wanted: list[str], revision: str | None) -> Iterator[tuple[str, str]]:
    """(name, markdown) of each file that is asked for."""
    listing = ["ls-tree", "-r", "--name-only", revision] if revision else ["ls-files"]
    for name in _git(*listing, "--", *wanted).splitlines():
        is_notebook = name.startswith("notebooks/") and re.search(
            r"/\d\d_\w+\.py$", name
        )
        if is_notebook or name.endswith(".md"):
            text = (
                _git("show", f"{revision}:{name}")
                if revision
                else ((ROOT / name).read_text("utf-8"))
            )
            yield name, of_notebook(text) if is_notebook else text


def _git(*arguments: str) -> str:
    return subprocess.run(
        ["git", *arguments], cwd=ROOT, check=True, capture_output=True, text=True
    ).stdout


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", default=list(FOLDERS))
    parser.add_argument("--at", metavar="REVISION")
    options = parser.parse_args()
    together = []
    for name, text in texts(options.names, options.at):
        own = sentences(text)
        together += own
        print(f"{name:40} {measure(own)}")
    print(f"{'all':40} {measure(together)}")


if __name__ == "__main__":
    main()
