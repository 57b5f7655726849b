"""The candidates of the comparison: each is one way to adapt the base model.

A method's candidate comes from its row in the table of methods, so that a new method
needs nothing here. VARIANTS has what is no method of its own: prompting without any
training, another library's way, and options of a method. Reading this file imports
neither torch nor a method.
"""

import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from ..methods import METHODS, Method, named

LIBRARY = "bitsandbytes"  # whose QLoRA stands beside ours


@dataclass(frozen=True)
class Candidate:
    """One way to adapt the model.

    Args
        key                    its name on the command line and in result files
        label                  its name in tables
        method                 of the table of methods; None where no parameter trains
        options                arguments of the injection
        injection              "module:function", where that is not the method's inject
        few_shot               examples stand before the prompt
        steps_factor           optimizer steps, as a multiple of the plan's
        init_from_instruction  it starts from the tokens of the task's instruction:
                               inject(start=)
        lr_ratio               of its recipe
        settings_from          another candidate, whose searched settings serve where
                               this one has none
        family                 a relative, for a comparison that asks for the family
        library                that library's way, to stand beside ours; left out where
                               it is not installed
    """

    key: str
    label: str
    method: str | None = None
    options: Mapping[str, object] = field(default_factory=dict)
    injection: str | None = None
    few_shot: bool = False
    steps_factor: int = 1
    init_from_instruction: bool = False
    lr_ratio: float = 1.0
    settings_from: str | None = None
    family: bool = False
    library: str | None = None

    @property
    def trains(self) -> bool:
        """Whether any parameter trains."""
        return self.method is not None

    @property
    def rates(self) -> tuple[float, ...]:
        """Peak learning rates that a search tries first; () where nothing trains."""
        return named(self.method).rates if self.trains else ()

    def inject(self, model, **more) -> list[str]:
        """Make a loaded model trainable; the names of what was injected.

        Args
            more  further arguments of the method's inject
        """
        function: Callable = (
            pkgutil.resolve_name(self.injection)
            if self.injection
            else named(self.method).module.inject
        )
        return function(model, **self.options, **more)


def _low_rank(key: str, label: str, **more) -> Candidate:
    """A variant of LoRA: one of the family, with LoRA's settings where it has none."""
    return Candidate(key, label, "lora", settings_from="lora", family=True, **more)


VARIANTS = (
    Candidate("zero-shot", "Zero-shot"),
    Candidate("few-shot", "Few-shot", few_shot=True),
    Candidate(
        "qlora-bnb",
        "QLoRA on bitsandbytes",
        "qlora",
        injection="peft_from_scratch.comparison.reference:qlora",
        settings_from="qlora",  # the same method: what differs is the library
        library=LIBRARY,
    ),
    _low_rank("lora-attention", "LoRA, attention", options={"targets": "attention"}),
    _low_rank("rslora", "rsLoRA", options={"rslora": True}),
    _low_rank("lora-plus", "LoRA+", lr_ratio=16.0),
)


def _of_method(method: Method) -> Candidate:
    """The candidate that a row of the table of methods asks for."""
    compared = method.compared
    return Candidate(
        key=method.name,
        label=compared.label or method.label,
        method=method.name,
        options=compared.options,
        steps_factor=compared.steps_factor,
        init_from_instruction=compared.init_from_instruction,
        settings_from=compared.settings_from,
        family=compared.family,
    )


def _in_order() -> tuple[Candidate, ...]:
    """Prompting, then each method before its variants; the whole family at the end."""
    methods = [_of_method(method) for method in METHODS if method.compared]
    places = {None: -1} | {method.name: i for i, method in enumerate(METHODS)}
    return tuple(
        sorted(
            [*methods, *VARIANTS],
            key=lambda candidate: (candidate.family, places[candidate.method]),
        )
    )


CANDIDATES = _in_order()
USUAL = tuple(candidate.key for candidate in CANDIDATES if not candidate.family)
RELATIVES = tuple(candidate.key for candidate in CANDIDATES if candidate.family)
