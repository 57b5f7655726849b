"""How an adapter wants to be spoken to: as in its training, which its record says.

Spoken to in another way, an adapter answers worse, and nothing would show why.
"""

from pathlib import Path

from ..common import records
from ..common.check import require
from .plain_text import is_unicode
from .templates import TEMPLATES

RECORD = "training.json"  # the last file of a run: where it is, the run is finished


def recorded(file: Path) -> tuple[str, str] | tuple[None, None]:
    """(template, instruction) of a training record; None for both where there is none.

    Raises  ValueError  a record that does not say both
    """
    if not file.exists():
        return None, None
    try:
        record = records.read_object(file)
        recipe, instruction = record.get("recipe"), record.get("instruction")
        template = recipe.get("template") if isinstance(recipe, dict) else None
        words = " or ".join(map(repr, TEMPLATES))
        field = f"recipe.template in {file}"
        require(template in TEMPLATES, field, template, f"allowed is {words}")
        fine = isinstance(instruction, str) and is_unicode(instruction)
        require(fine, f"instruction in {file}", instruction, "allowed is text")
    except ValueError as error:
        raise ValueError(
            f"{error}. It says how the adapter was spoken to in training: mend it"
        ) from None
    return template, instruction
