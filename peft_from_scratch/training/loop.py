"""Training: one plain loop, the same for every method.

`optimizer_steps` is the loop, to be read whole. `train` is what stands around it: which
rows, where to resume, when to validate and to write a checkpoint, what to show.

What fails silently elsewhere is an error here (guards.py): a loss that is not finite, a
trainable tensor that three steps have not moved, a folder with another run's
checkpoints.
"""

import math
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from torch import nn

from ..common import scoped
from ..common.progress import bar
from ..tasks.templates import encode_rows
from . import checkpoint
from .abilities import refuse_unable
from .attention import written_out
from .batch import Row, label_tokens
from .buckets import saved_padding
from .chunked_loss import loss_of
from .config import History, TrainConfig, learning_rate, rows_of_step
from .gradient_checkpointing import recomputed
from .guards import (
    MOVED_AFTER,
    Diverged,
    fingerprints,
    refuse_not_finite,
    refuse_unmoved,
)
from .loss import mean_loss, micro_batch_loss
from .packing import Packing, packing_for
from .precision import autocast
from .state import Engine, TrainState, alone, new_state


def optimizer_steps(
    model: nn.Module,
    state: TrainState,
    config: TrainConfig,
    micro_batches_of: Callable[[int], list[list[Row]]],
    packing: Packing,
) -> Iterator[History]:
    """The training loop: an optimizer step for each value that it yields.

    Args
        state             where the run stands: its history says which step is next
        micro_batches_of  gives the micro-batches of a step, whose numbers start at 0
        packing           makes a batch of a micro-batch's rows (packing.py)
    Yields   the history, after each step
    Raises   Diverged, RuntimeError  see train(); the weights are those before the step
    """
    history, optimizer = state.history, state.optimizer
    summed = loss_of(config.chunk)  # at once, or in chunks
    while not history.finished(config.steps):
        start, step, total = time.perf_counter(), history.steps, 0.0
        state.begin_step(config)
        batches = [packing.batch(rows) for rows in micro_batches_of(step)]
        step_tokens = state.total(sum(map(label_tokens, batches)))  # of all ranks
        for batch in batches:
            with autocast(config, state.device):
                part = micro_batch_loss(model, batch, step_tokens, summed)
            state.backward(part)
            total += part.detach()
        max_norm = math.inf if config.clip is None else config.clip  # inf: no clipping
        norm = state.clip(max_norm)  # the one before
        loss = state.total(total.item())  # nats per label token
        lr = learning_rate(config, step)
        refuse_not_finite(loss, norm, step=step + 1, steps=config.steps, lr=lr)
        for group in optimizer.param_groups:
            group["lr"] = lr * group["ratio"]  # ratio: LoRA+ trains B at a higher rate
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        history.record(loss, lr, norm, step_tokens, time.perf_counter() - start)
        yield history


def train(
    model: nn.Module,
    tokenizer,
    task,
    config: TrainConfig,
    *,
    encoded: tuple[list[Row], list[Row]] | None = None,
    checkpoints: str | Path | None = None,
    progress: bool = True,
    on_step: Callable[[History], object] | None = None,
    engine: Engine = alone,
) -> History:
    """Train the injected adapters of `model` on the rows of `task`.

    Args
        task         has .instruction, .train and .validation (tasks.py)
        encoded      its rows of both splits as tokens, for a caller that has them;
                     None: encode_splits makes them
        checkpoints  a folder, made if need be. A run that was killed and is called
                     again with the same arguments goes on from its newest checkpoint,
                     to bit-identical weights (same machine, same number of threads)
        progress     show a bar with loss and time left, in a terminal or a notebook
        on_step      called with the history after every step
        engine       who takes the steps: this process alone, or one of parallel/, which
                     every rank calls with the same arguments
    Returns  History. Training flags and random generators are as the caller had them
    Raises   Diverged           a loss or gradient that is not finite; the weights are
                                those before that step (of a validation: after it)
             RuntimeError       a trainable tensor that three steps did not move
             ValueError         no adapter, no rows, a row that is too long, a recipe
                                that the model cannot follow (abilities.py), or a folder
                                with the checkpoints of another run
             KeyboardInterrupt  on Ctrl-C, once the step is done and its checkpoint
                                written; a second Ctrl-C does not wait
    """
    state = new_state(model, config)
    refuse_unable(model, config)
    rows, validation = encoded or encode_splits(tokenizer, task, config)
    settings = checkpoint.configuration(model, config, (rows, validation))
    packing = packing_for(model, [*rows, *validation])

    def of_step(step: int) -> list[list[Row]]:
        return state.share(micro_batches(rows, config, step))

    with (
        engine(model, state, config) as (model, state),
        written_out(model, config, packing, [*rows, *validation], of_step(0)),
        recomputed(model, config.checkpointing),
        scoped.mode(model, training=True),
        scoped.seeded(config.seed, state.device),
        scoped.held_ctrl_c() as pressed,
        state.without_gradients(),
    ):
        if checkpoints:
            checkpoint.resume(state, checkpoints, settings)
        history = state.history
        history.packing = packing.described(of_step(0))
        history.packing += saved_padding(packing, config, partial(micro_batches, rows))
        start = time.perf_counter() - history.seconds
        young = history.steps < MOVED_AFTER
        before = fingerprints(state.weights()) if young else {}
        steps, done = config.steps, history.steps
        with bar("train", "step", steps, done=done, shown=progress) as shown:
            for history in optimizer_steps(model, state, config, of_step, packing):
                if history.steps == MOVED_AFTER:
                    refuse_unmoved(state.weights(), state.moments(), before)
                if _due(config.validate_every, history, config):
                    _validate(model, state, validation, config, packing)
                history.seconds = time.perf_counter() - start
                stop = state.total(pressed.is_set()) > 0  # on any rank
                due = stop or _due(config.checkpoint_every, history, config)
                if checkpoints and due:
                    checkpoint.save(state, checkpoints, settings)
                shown.set_postfix_str(_figures(history), refresh=False)
                shown.update()
                if on_step:
                    on_step(history)
                if stop:
                    rest = (
                        f"call again to go on from {checkpoints}"
                        if checkpoints
                        else "nothing is saved: checkpoints=None"
                    )
                    raise KeyboardInterrupt(
                        f"stopped after step {history.steps}; {rest}"
                    )
        if config.patience:
            state.load_weights(state.best)
    return history


def encode_splits(tokenizer, task, config: TrainConfig) -> tuple[list[Row], list[Row]]:
    """The training rows of a task as tokens, and the validation rows if they are used.

    Raises  ValueError   a row that does not fit, or a split without rows
    """
    encode = partial(
        encode_rows,
        tokenizer,
        task.instruction,
        template=config.template,
        max_tokens=config.max_tokens,
    )
    rows = encode(task.train)
    validation = encode(task.validation) if config.validate_every else []
    if not rows or (config.validate_every and not validation):
        empty = "validation" if rows else "train"
        raise ValueError(f"the task has no {empty} rows, which this recipe needs")
    return rows, validation


def micro_batches(rows: list[Row], config: TrainConfig, step: int) -> list[list[Row]]:
    """The rows of optimizer step number `step`, in `config.accumulate` equal parts."""
    bucketed = config.buckets > 1
    lengths = [len(ids) for ids, _ in rows] if bucketed else None
    chosen = [rows[i] for i in rows_of_step(config, step, len(rows), lengths)]
    if bucketed:  # which rows stand together changes no gradient
        chosen.sort(key=lambda row: len(row[0]))
    size = config.batch // config.accumulate
    return [chosen[i : i + size] for i in range(0, config.batch, size)]


def _due(every: int, history: History, config: TrainConfig) -> bool:
    """Whether something that happens `every` so many steps, and at the end, is due."""
    on_time = every > 0 and history.steps % every == 0
    return on_time or (every > 0 and history.finished(config.steps))


def _validate(
    model: nn.Module,
    state: TrainState,
    rows: list[Row],
    config: TrainConfig,
    packing: Packing,
) -> None:
    """Add the loss on the validation rows to the history; with patience, act on it."""
    history = state.history
    size = config.batch // config.accumulate
    with autocast(config, state.device):
        loss = mean_loss(
            model,
            rows,
            batch=size,
            collate=packing.batch,
            summed=loss_of(config.chunk),
        )
    loss = state.total(loss) / state.ranks  # one number, whatever each rank has rounded
    if not math.isfinite(loss):
        raise Diverged(
            f"step {history.steps} of {config.steps}, learning rate "
            f"{history.lr[-1]:.3g}: the validation loss after it is {loss}. Try a "
            "tenth of the rate, more warm-up, or float32"
        )
    history.validation.append((history.steps, loss))
    if config.patience:
        _keep_best_or_stop(state, config)


def _keep_best_or_stop(state: TrainState, config: TrainConfig) -> None:
    history = state.history
    if history.best_step == history.steps:
        state.best = state.copies()
    worse = history.stale >= config.patience
    history.stopped_early = worse and history.steps < config.steps


def _figures(history: History) -> str:
    figures = f"loss {history.loss[-1]:.3f}, lr {history.lr[-1]:.1e}"
    if history.validation:
        figures += f", validation {history.validation[-1][1]:.3f}"
    return figures
