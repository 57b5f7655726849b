"""The contract: what every method promises, and what the verbs do, written once.

A method wraps modules. The wrapper, an `Adapter`, holds the frozen module as `.base`
and adds what trains. From this follow `inject`, `trainable`, `merge` and `remove`, on
any causal language model of transformers.

Reading order: adapter.py (the contract and the verbs), targets.py (which modules a
method wraps, found by structure), decoder.py (the second place to wrap: the module that
owns the list of layers), decoder_probe.py (whether a model treats what is there as it
treats tokens), merge.py (adapters folded into the weights), counting.py (parameters:
how many, and how many train), left_out.py (what presets do not adapt), matrices.py (a
matrix as the product of two thin ones).
"""
