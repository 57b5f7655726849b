"""Pages of one file: HTML that loads nothing and runs nothing, its figures inside it.

    rendered(template, **values)     the page; jinja2 escapes every value
    in_four(draw, wide, narrow)      a figure: wide and narrow, light and dark

A template takes `page.css`, the looks that all pages share, with
`{% include "page.css" %}`. `printable` takes out what could reorder or hide text.
"""

import base64
import re
from collections.abc import Callable
from importlib import resources
from unicodedata import category

import jinja2
from matplotlib.figure import Figure

from .theme import DARK, LIGHT, svg


def rendered(template: str, **values) -> str:
    """The template with these values, and with the colors `light` and `dark`."""
    shared = resources.files(__package__).joinpath("page.css").read_text("utf-8")
    environment = jinja2.Environment(
        autoescape=True,
        finalize=printable,
        loader=jinja2.DictLoader({"page.css": shared}),
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters["typeset"] = typeset
    page = environment.from_string(template)
    return page.render(light=LIGHT, dark=DARK, **values)


def printable(value):
    """Plain text with what is invisible, or reorders its surroundings, made visible."""
    if type(value) is not str:  # a number, or markup that the template made
        return value
    return "".join(
        "\N{REPLACEMENT CHARACTER}" if category(c)[0] == "C" and c not in "\n\t" else c
        for c in value
    )


def typeset(text: str) -> str:
    """Numbers with a true minus sign, and never parted from their per cent sign."""
    text = re.sub(r"(?<!\w)-(?=\d)", "\N{MINUS SIGN}", text)
    return text.replace(" %", "\N{NO-BREAK SPACE}%")


def in_four(
    draw: Callable[..., Figure], wide: float, narrow: float, small: bool = False
) -> dict[str, str]:
    """{"light_wide": data URI, …} of a figure, which `draw(width=…, theme=…)` makes.

    Args
        wide, narrow  inches
        small         as theme.svg has it
    """
    return {
        f"{shade}_{size}": _data_uri(draw(width=width, theme=theme), small)
        for shade, theme in (("light", LIGHT), ("dark", DARK))
        for size, width in (("wide", wide), ("narrow", narrow))
    }


def _data_uri(figure: Figure, small: bool) -> str:
    text = base64.b64encode(svg(figure, small).encode()).decode()
    return f"data:image/svg+xml;base64,{text}"
