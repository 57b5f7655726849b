"""One optimizer step: who holds memory at which moment, followed and predicted.

    seen = followed(model, loss_of, length=512)     a real step, by its moments
    levels = predicted(bill.moments)                the same moments, from a bill
    over_time(seen, levels, title=…)                bytes, the prediction as lines
    holders(bill.parts)                             who holds them, for curves.bars

What is followed is every tensor that is allocated or freed. So the picture has the
order of what happens, and no times: it is the same on every machine. Bytes have the
colors of plotting.curves.
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from torch import Tensor, nn

from ...core.adapter import trainable
from ...memory.budget import Budget
from ...memory.meter import Meter
from ...memory.step_bill import optimizer_class
from ...plotting.curves import FOOT, HOLDERS
from ...plotting.draw import frame, legend, name_y, point
from ...plotting.theme import AMBER, LIGHT, RED, SMALL, Theme, style

GB = 1e9
MOMENTS = {  # a step that is followed: the moments of memory/timeline.py in each
    "forward": ("forward",),
    "loss": ("loss", "head's gradient"),
    "backward": ("backward begins", "first layer", "backward ends"),
    "update": ("optimizer step",),
}
LAYERS = {  # kinds of the meter, from the bottom: (name, color)
    "weights": ("weights", HOLDERS["weights"]),
    "optimizer": ("states", HOLDERS["optimizer"]),
    "gradients": ("gradients", HOLDERS["gradients"]),
    "activations": ("activations and logits", HOLDERS["activations"]),
}
MASTER, M_AND_V, COPIES = "master copy", "m and v", "bfloat16 copies"
KINDS = {  # {holder: color}, in the order of stacking; colors as in curves.bars
    "weights": HOLDERS["weights"],
    "gradients": HOLDERS["gradients"],
    MASTER: HOLDERS["master"],
    M_AND_V: HOLDERS["optimizer"],
    COPIES: AMBER,
    "activations": HOLDERS["activations"],
    "logits": RED,
}
COUNTED_AS = {  # {recipe of memory.setups: that of memory.step_bill}
    "float32": "fp32",
    "autocast": "fp32",
    "mixed": "mixed",
    "bf16-pure": "bf16",
}
FEW = 4  # tokens of the step in which the optimizer allocates its states
Batch = dict[str, Tensor]


class Followed(NamedTuple):
    """One optimizer step, in bytes.

    series  {kind of the meter: bytes after each event}
    starts  {moment: its first event}, of MOMENTS
    """

    series: dict[str, np.ndarray]
    starts: dict[str, int]

    @property
    def total(self) -> np.ndarray:
        return sum(self.series.values())

    def peaks(self) -> dict[str, int]:
        """{moment: the most bytes at one time in it}"""
        ends = [*list(self.starts.values())[1:], len(self.total) - 1]
        pairs = zip(self.starts.items(), ends, strict=True)
        return {name: int(self.total[a : b + 1].max()) for (name, a), b in pairs}


def followed(
    model: nn.Module, loss_of: Callable, length: int, recipe: str = "float32"
) -> Followed:
    """Follow every tensor of the second step of an injected model, on random tokens.

    The first step is short, and only allocates the optimizer's states.

    Args
        model    Llama's form, with what trains in it. Its weights move
        loss_of  (model, batch) -> a scalar
        recipe   one of memory.setups
    """
    model.train()
    plain = {} if recipe == "mixed" else {"foreach": False}  # a tensor at a time
    optimizer = optimizer_class(COUNTED_AS[recipe])(
        trainable(model).values(), lr=1e-5, **plain
    )
    loss_of(model, tokens(model, FEW)).backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    batch, starts = tokens(model, length), {}
    with Meter(model) as meter:
        # The loss begins where the head is called, and backward where the last norm's
        # output has its gradient.
        starts["forward"] = 0
        note = lambda name: starts.setdefault(name, len(meter.events))  # noqa: E731
        head, norm = model.get_output_embeddings(), model.get_decoder().norm

        def end_of_loss(module, args, h) -> None:
            h.register_hook(lambda _: note("backward") and None)

        hooks = [
            head.register_forward_pre_hook(lambda *_: note("loss") and None),
            norm.register_forward_hook(end_of_loss),
        ]
        loss = loss_of(model, batch)
        loss.backward()
        note("update")
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    for hook in hooks:
        hook.remove()
    return Followed(replayed(meter), starts)


def replayed(meter: Meter) -> dict[str, np.ndarray]:
    """{kind: bytes at the beginning and after each event}, (events + 1,) each."""
    series = {kind: np.zeros(len(meter.events) + 1, np.int64) for kind in LAYERS}
    for storage in meter.existing:
        series[meter.kind.get(storage, "activations")][0] += meter.size[storage]
    for moment, (storage, change) in enumerate(meter.events, 1):
        series[meter.kind.get(storage, "activations")][moment] += change
    return {kind: np.cumsum(changes) for kind, changes in series.items()}


def tokens(model: nn.Module, length: int) -> Batch:
    """A batch of one random row, all of it labels."""
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(model.config.vocab_size, (1, length), generator=draw)
    ids = ids.to(next(model.parameters()).device)
    return {"input_ids": ids, "labels": ids}


def predicted(moments: Mapping[str, Mapping[str, int]]) -> dict[str, int]:
    """{moment of a followed step: bytes} of the moments that a bill predicts."""
    sums = {name: sum(parts.values()) for name, parts in moments.items()}
    return {name: max(sums[each] for each in own) for name, own in MOMENTS.items()}


def over_time(
    seen: Followed,
    bytes_: Mapping[str, int],
    *,
    title: str,
    subtitle: str = "",
    top: float | None = None,
    width: float = 7.4,
    theme: Theme = LIGHT,
) -> Figure:
    """Bytes during a step, stacked by who holds them, and what was predicted.

    The four moments are equally wide, since the loss, a spike, has few events.

    Args
        bytes_  {moment: predicted bytes}, drawn as a dashed line over the moment
        top     bytes at the upper end of the axis; None: as the step needs
    """
    edge = {"edgecolor": theme.ink, "linewidth": 0.5}
    handles = [Patch(facecolor=c, label=name, **edge) for name, c in LAYERS.values()]
    with style(theme):
        room = legend(frame("", "", width, 1, FOOT, theme)[0], handles)
        figure, axes = frame(title, subtitle, width, 2.6, FOOT + room, theme)
        legend(figure, handles)
        rows = [seen.series[kind] / GB for kind in LAYERS]
        colors = [color for _, color in LAYERS.values()]
        axes.stackplot(places(seen), *rows, colors=colors, linewidth=0)
        top = top or 1.2 * max(seen.total.max(), *bytes_.values())
        axes.set(xlim=(0, len(MOMENTS)), ylim=(0, top / GB), xticks=[])
        axes.set_xlabel("Order in which tensors are allocated and freed, no scale")
        name_y(axes, "Memory, GB (10⁹ bytes)")
        _name_moments(axes, seen, bytes_, theme)
    return figure


def places(seen: Followed) -> np.ndarray:
    """Where each event is drawn: moment i is between i and i + 1."""
    starts = [*seen.starts.values(), len(seen.total) - 1]
    return np.interp(np.arange(len(seen.total)), starts, np.arange(len(starts)))


def _name_moments(axes: Axes, seen: Followed, bytes_: Mapping, theme: Theme) -> None:
    """A border between two moments, their names on top, and the predicted lines."""
    high, most = axes.get_ylim()[1], max(seen.peaks(), key=seen.peaks().get)
    for i, name in enumerate(seen.starts):
        if i:
            axes.axvline(i, color=theme.muted, linewidth=0.8, gid="moment")
        weight = "bold" if name == most else "normal"
        spot = {"ha": "center", "va": "top", "size": SMALL, "weight": weight}
        words = f"{name}: the peak" if name == most else name
        axes.text(i + 0.5, 0.97 * high, words, **spot)
        level = [bytes_[name] / GB] * 2
        dashed = {"linestyle": "--", "linewidth": 1.6, "gid": "predicted"}
        axes.add_line(point((RED, ""), theme, [i, i + 1], level, **dashed))


def table(seen: Followed, bytes_: Mapping[str, int]) -> str:
    """Each moment's bytes, predicted and measured, a line each."""
    lines = [f"{'moment':10}{'predicted':>12}{'measured':>12}"]
    for name, most in seen.peaks().items():
        lines.append(f"{name:10}{bytes_[name] / GB:9.3f} GB{most / GB:9.3f} GB")
    return "\n".join(lines)


# Who holds the bytes of a bill --------------------------------------------------------


def holders(parts: Mapping[str, int]) -> dict[str, int]:
    """{holder: bytes} of a predicted bill's parts, each at its own maximum."""
    return {
        "weights": parts["weights"] + parts["adapter"],
        "gradients": parts["gradients"],
        MASTER: parts["master"],
        M_AND_V: parts["optimizer"],
        "activations": parts["activations"],
        "logits": parts["logits"],
    }


def counted(count: Mapping, parameters: float) -> dict[str, float]:
    """The same of a counted bill, scaled to so many parameters, without activations.

    Args
        count  what experiments.bill.counted returns
    """
    bytes_, master = count["bytes"], count["state"].get("master", 0)
    scale = parameters / count["parameters"]
    return {
        "weights": scale * bytes_["weights"],
        "gradients": scale * bytes_["gradients"],
        MASTER: scale * master,
        M_AND_V: scale * (bytes_["optimizer"] - master),
    }


def beside(predicted: Budget, count: Mapping) -> list[tuple[float, float]]:
    """[(predicted, counted), …] bytes a parameter: weights, gradients, states."""
    parts, rows = predicted.parts, count["per_parameter"]
    states = parts["master"] + parts["optimizer"]
    expected = parts["weights"], parts["gradients"], states
    of_rows = rows["weights"], rows["gradients"], rows["optimizer"]
    each = [size / predicted.weighed.total for size in expected]
    return list(zip(each, of_rows, strict=True))
