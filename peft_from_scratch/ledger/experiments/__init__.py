"""One file an experiment: how it is run, and the claims that it decides.

A module here has

    compute(config) -> result    one run, by its configuration; as JSON can hold both
    CLAIMS                       the claims that its runs decide (claim.py), if any;
                                 the functions that plan their runs read the run store
                                 where a search has to be finished first

and its name is the "experiment" of its configurations. That is all it takes to add a
claim: the ledger finds the module by itself. finetune.py is the general kind, whose
runs serve many claims; rates.py and intervals.py are what they share.
"""

from importlib import import_module


def compute(config: dict) -> dict:
    """Run one configuration, by the module that it names; nothing is stored."""
    return import_module(f"{__name__}.{config['experiment']}").compute(config)
