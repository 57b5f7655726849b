"""Training: one plain loop, the same for every method.

    for each step:
        rows       chosen by the seed and the step, as tokens and labels
        loss       summed over the label tokens, divided by their number (loss.py)
        gradients  clipped to a norm; AdamW at the step's learning rate
        sometimes  look at the validation rows, write a checkpoint (checkpoint.py)

What fails silently elsewhere is an error here: a loss that is not finite, a trainable
tensor that three steps have not moved, a folder with another run's checkpoints.
"""

import math
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from ..common import scoped
from ..common.progress import bar
from ..core.adapter import adapters, trainable
from ..memory.meter import Memory, measure_step
from ..paged import PAGE_BYTES, PagedAdamW
from ..tasks.templates import encode_rows
from . import checkpoint
from .checkpoint import Run
from .config import History, Recipe, learning_rate, rows_of_step
from .loss import EncodedExample, accumulate_gradients, batch_of, mean_loss

MOVED_AFTER = 3  # steps: a LoRA's B moves in the first, A, behind B = 0, in the second


class Diverged(FloatingPointError):
    """A loss or a gradient is not a finite number; the message holds step and rate."""


def train(
    model: nn.Module,
    tokenizer,
    task,
    recipe: Recipe,
    *,
    checkpoints: str | Path | None = None,
    progress: bool = True,
    on_step: Callable[[History], object] | None = None,
) -> History:
    """Train the injected adapters of `model` on the rows of `task`.

    Args
        task         has .instruction, .train and .validation (tasks.py)
        checkpoints  a folder, made if need be. A run that was killed and is called
                     again with the same arguments goes on from its newest checkpoint,
                     to bit-identical weights (same machine, same number of threads)
        progress     show a bar with loss and time left, in a terminal or a notebook
        on_step      called with the history after every step
    Returns  History. Training flags and random generators are as the caller had them
    Raises   Diverged           a loss or gradient that is not finite; the weights are
                                those before that step (of a validation: after it)
             RuntimeError       a trainable tensor that three steps did not move
             ValueError         no adapter, no rows, a row that is too long, or a folder
                                with the checkpoints of another run
             KeyboardInterrupt  on Ctrl-C, once the step is done and its checkpoint
                                written; a second Ctrl-C does not wait
    """
    run = _new_run(model, recipe)
    rows, held_out = _encode(tokenizer, task, recipe)
    settings = checkpoint.configuration(model, recipe, (rows, held_out))
    with (
        scoped.mode(model, training=True),
        scoped.seeded(recipe.seed, run.device),
        scoped.held_ctrl_c() as pressed,
    ):
        if checkpoints:
            checkpoint.resume(run, checkpoints, settings)
        history = run.history
        start = time.perf_counter() - history.seconds
        before = _fingerprints(run) if history.steps < MOVED_AFTER else {}
        done, steps = history.steps, recipe.steps
        with bar("train", "step", steps, done=done, shown=progress) as told:
            while not _finished(history, recipe):
                _step(model, run, _micro_batches(rows, recipe, history.steps), recipe)
                if history.steps == MOVED_AFTER:
                    _refuse_unmoved(run, before)
                if _due(recipe.validate_every, history, recipe):
                    _validate(model, run, held_out, recipe)
                history.seconds = time.perf_counter() - start
                stop = pressed.is_set()
                due = stop or _due(recipe.checkpoint_every, history, recipe)
                if checkpoints and due:
                    checkpoint.save(run, checkpoints, settings)
                told.set_postfix_str(_figures(history), refresh=False)
                told.update()
                if on_step:
                    on_step(history)
                if stop:
                    raise KeyboardInterrupt(_how_to_go_on(history, checkpoints))
    if recipe.patience:
        checkpoint.load_weights(run.trainable, run.best)
    return history


def measured_step(model: nn.Module, tokenizer, task, recipe: Recipe) -> Memory:
    """Count the bytes of the recipe's largest step, the one with most padded tokens.

    The optimizer's state is there from the start, as in every step but the first.
    Weights, flags and random generators are as before when it returns.
    """
    run = _new_run(model, recipe)
    rows, _ = _encode(tokenizer, task, recipe)
    before = _copies(run)
    steps = (_micro_batches(rows, recipe, step) for step in range(recipe.steps))
    largest = max(steps, key=lambda micro_batches: max(map(_padded, micro_batches)))
    try:
        with (
            scoped.mode(model, training=True),
            scoped.seeded(recipe.seed, run.device),
        ):
            _allocate_state(run.optimizer, run.trainable)
            return measure_step(model, lambda: _step(model, run, largest, recipe))
    finally:
        checkpoint.load_weights(run.trainable, before)


def _new_run(model: nn.Module, recipe: Recipe) -> Run:
    parameters = trainable(model)
    if not parameters:
        raise ValueError(
            f"this {type(model).__name__} has nothing to train: inject adapters first, "
            "with lora.inject(model) for example, or full.inject(model)"
        )
    declared = {id(parameter) for parameter in parameters.values()}
    named = dict(model.named_parameters())
    wrong = [n for n, p in named.items() if p.requires_grad != (id(p) in declared)]
    if wrong:
        raise ValueError(
            f"{wrong[0]} has requires_grad={named[wrong[0]].requires_grad}, against "
            f"what inject() declared, and so have {len(wrong) - 1} more; leave the "
            "flags to inject()"
        )
    groups = _groups(model, parameters, recipe)
    optimizer = _optimizer(groups, recipe)
    optimizer.zero_grad(set_to_none=True)  # what a backward pass of the caller's left
    names = {id(parameter): name for name, parameter in parameters.items()}
    ordered = [p for group in groups for p in group["params"]]  # as AdamW numbers them
    trained = {names[id(parameter)]: parameter for parameter in ordered}
    return Run(trained, optimizer, ordered[0].device)


def _optimizer(groups: list[dict], recipe: Recipe) -> torch.optim.Optimizer:
    settings = dict(lr=recipe.lr, betas=recipe.betas, weight_decay=recipe.weight_decay)
    if recipe.paged is None:
        return torch.optim.AdamW(groups, **settings, fused=True)
    paged = PagedAdamW(groups, **settings, budget_bytes=PAGE_BYTES)
    paged.budget_bytes = max(PAGE_BYTES, int(recipe.paged * paged.states_bytes))
    return paged


def _groups(model, parameters: dict[str, nn.Parameter], recipe: Recipe) -> list[dict]:
    """AdamW's groups, each with its rate over the recipe's: LoRA+ has two."""
    if recipe.lr_ratio == 1:
        return [{"params": list(parameters.values()), "ratio": 1.0}]
    modules = adapters(model).values()
    fast = {
        id(m.get_parameter(name)) for m in modules for name in m.loraplus_parameters
    }
    if not fast:
        raise ValueError(
            f"lr_ratio={recipe.lr_ratio} is for the B of a LoRA, and this "
            f"{type(model).__name__} has none: leave it at 1"
        )
    slow = [p for p in parameters.values() if id(p) not in fast]
    quick = [p for p in parameters.values() if id(p) in fast]
    return [
        {"params": slow, "ratio": 1.0},
        {"params": quick, "ratio": recipe.lr_ratio},
    ]


def _allocate_state(optimizer, parameters: dict[str, nn.Parameter]) -> None:
    """A step on zero gradients: AdamW makes its moments in its first step."""
    for parameter in parameters.values():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def _encode(
    tokenizer, task, recipe: Recipe
) -> tuple[list[EncodedExample], list[EncodedExample]]:
    encode = partial(
        encode_rows,
        tokenizer,
        task.instruction,
        template=recipe.template,
        max_tokens=recipe.max_tokens,
    )
    rows = encode(task.train)
    held_out = encode(task.validation) if recipe.validate_every else []
    if not rows or (recipe.validate_every and not held_out):
        empty = "validation" if rows else "train"
        raise ValueError(f"the task has no {empty} rows, which this recipe needs")
    return rows, held_out


def _micro_batches(
    rows: list[EncodedExample], recipe: Recipe, step: int
) -> list[list[EncodedExample]]:
    chosen = [rows[i] for i in rows_of_step(recipe, step, len(rows))]
    size = recipe.batch // recipe.accumulate
    return [chosen[i : i + size] for i in range(0, recipe.batch, size)]


def _padded(rows: list[EncodedExample]) -> int:
    return len(rows) * max(len(ids) for ids, _ in rows)


def _step(
    model, run: Run, micro_batches: list[list[EncodedExample]], recipe: Recipe
) -> None:
    start = time.perf_counter()
    history = run.history
    lr = learning_rate(recipe, history.steps)
    try:
        batches = [batch_of(rows, run.device) for rows in micro_batches]
        loss, tokens = accumulate_gradients(model, batches)
        norm = _clip(run, recipe)
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise Diverged(
                f"step {history.steps + 1} of {recipe.steps}, learning rate {lr:.3g}: "
                f"the loss is {loss} and the norm of the gradient {norm}. The weights "
                "are those before this step. Try a tenth of the rate, more warm-up, or "
                "float32"
            )
        for group in run.optimizer.param_groups:
            group["lr"] = lr * group["ratio"]
        run.optimizer.step()
    finally:
        run.optimizer.zero_grad(set_to_none=True)
    history.loss.append(loss)
    history.lr.append(lr)
    history.norm.append(norm)
    history.tokens.append(tokens)
    history.step_seconds.append(time.perf_counter() - start)


def _clip(run: Run, recipe: Recipe) -> float:
    """Scale the whole gradient to a norm of at most `clip`; returns the norm before."""
    limit = recipe.clip or math.inf
    return nn.utils.clip_grad_norm_(list(run.trainable.values()), limit).item()


def _validate(model, run: Run, held_out: list[EncodedExample], recipe: Recipe) -> None:
    history = run.history
    loss = mean_loss(model, held_out, batch=recipe.batch // recipe.accumulate)
    if not math.isfinite(loss):
        raise Diverged(
            f"step {history.steps} of {recipe.steps}, learning rate "
            f"{history.lr[-1]:.3g}: the validation loss after it is {loss}. Try a "
            "tenth of the rate, more warm-up, or float32"
        )
    history.validation.append((history.steps, loss))
    if recipe.patience:
        if history.best_step == history.steps:
            run.best = _copies(run)
        worse = history.stale >= recipe.patience
        history.stopped_early = worse and history.steps < recipe.steps


def _finished(history: History, recipe: Recipe) -> bool:
    return history.stopped_early or history.steps == recipe.steps


def _due(every: int, history: History, recipe: Recipe) -> bool:
    on_time = every > 0 and history.steps % every == 0
    return on_time or (every > 0 and _finished(history, recipe))


def _copies(run: Run) -> dict[str, Tensor]:
    return {n: p.detach().to("cpu", copy=True) for n, p in run.trainable.items()}


def _fingerprints(run: Run) -> dict[str, int]:
    return {name: checkpoint.tensor_crc(p) for name, p in run.trainable.items()}


def _refuse_unmoved(run: Run, before: dict[str, int]) -> None:
    """RuntimeError naming the tensors that the first steps did not move, and why.

    Weight decay alone moves a tensor that learns nothing. So the optimizer's first
    moment counts as well: it is zero where every gradient was.
    """
    now, reasons, states = _fingerprints(run), {}, checkpoint.states(run)
    for name, parameter in run.trainable.items():
        moment = states.get(name, {}).get("exp_avg")
        if moment is None:
            reasons[name] = "no gradient reached it"
        elif not moment.any():
            reasons[name] = "its gradient is zero"
        elif now[name] == before[name]:
            reasons[name] = f"its updates vanish in {parameter.dtype}"
    if reasons:
        first = "; ".join(f"{n}: {why}" for n, why in list(reasons.items())[:3])
        raise RuntimeError(
            f"{len(reasons)} of {len(now)} trainable tensors did not move in "
            f"{MOVED_AFTER} steps ({first}). Known causes: an adapter on a module that "
            "the forward pass does not use; reentrant gradient checkpointing over "
            "frozen embeddings; a rate whose updates half precision rounds away"
        )


def _figures(history: History) -> str:
    figures = f"loss {history.loss[-1]:.3f}, lr {history.lr[-1]:.1e}"
    if history.validation:
        figures += f", validation {history.validation[-1][1]:.3f}"
    return figures


def _how_to_go_on(history: History, folder) -> str:
    if not folder:
        return f"stopped after step {history.steps}; nothing is saved: checkpoints=None"
    return f"stopped after step {history.steps}; call again to go on from {folder}"
