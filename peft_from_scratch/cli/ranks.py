"""`train --engine … --ranks N`: the command's work on each of N ranks.

Either this command starts the ranks on this machine, or torchrun has started them, on
one or several machines, and each runs this command. A rank knows by its environment.
"""

import os
import sys
from contextlib import ExitStack, redirect_stdout

from ..common import check
from ..parallel.engines import NAMES, engine_of
from ..parallel.group import is_rank, join
from ..parallel.launch import RankFailed, launch
from ..parallel.state import refuse_recipe
from .commands import fine_tune, train_config


def fine_tune_on_ranks(options) -> None:
    """fine_tune on --ranks new processes, or on this one of those that there are.

    Raises  ValueError  no engine, a recipe that so many ranks cannot share, other ranks
                        than torchrun has started
            RankFailed  a rank was killed; the same command goes on
    """
    if options.engine is None:
        raise ValueError(
            "several ranks, or a stage of ZeRO, and no engine: say --engine "
            + " or ".join(NAMES)
        )
    # What is wrong is said before any start.
    engine_of(options.engine, options.stage)
    asked = 1 if options.ranks is None else options.ranks
    there = int(os.environ["WORLD_SIZE"]) if is_rank() else asked
    check.whole("--ranks", there, 1, of="processes")
    refuse_recipe(train_config(options), there)
    if is_rank():
        check.require(
            options.ranks in (None, there),
            "--ranks",
            options.ranks,
            f"{there} ranks are started already, by torchrun for example; leave it out",
        )
        of_this_rank(options)
        return
    try:
        launch(of_this_rank, options, ranks=there)
    except RankFailed as error:
        raise RankFailed(
            f"{error}. The same command goes on from the newest checkpoint in "
            f"{options.out}"
        ) from None


def of_this_rank(options) -> None:
    """fine_tune on this rank; only rank 0 prints."""
    with ExitStack() as stack:
        group = stack.enter_context(join())
        if group.rank > 0:
            nothing = stack.enter_context(open(os.devnull, "w"))
            stack.enter_context(redirect_stdout(nothing))
        else:
            sys.stdout.reconfigure(line_buffering=True)
            by = f"{options.engine}" + (
                f", stage {options.stage}" * bool(options.stage)
            )
            print(f"{group.ranks} ranks train together by {by}")
        fine_tune(options, engine_of(options.engine, options.stage), group)
