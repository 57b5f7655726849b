"""One training loop for every method, and what stands around it.

Reading order:

    loop.py         optimizer_steps is the loop, 25 lines to be read whole
    loss.py         cross-entropy at the labelled positions, and nowhere else
    chunked_loss.py the same, and never all logits at once
    gradient_checkpointing.py  keeps a layer's input, and computes the layer twice
    batch.py        examples as tensors: padded right to train, left to generate
    buckets.py      rows of similar length in a step: less padding
    packing.py      rows packed behind their shared prefix: no token computed twice
    attention.py    short sequences in bfloat16 on a CPU: attention written out
    config.py       TrainConfig (what is asked), History (what happened), the schedule
    precision.py    which dtype holds what
    state.py        TrainState: all that the next step depends on; AdamW's groups
    guards.py       errors for what fails silently elsewhere
    abilities.py    a recipe that a model cannot follow is refused before it begins
    fitting.py      all rows of a task as tokens, or all that are wrong with them
    checkpoint.py   a killed run goes on, and ends in the same bits
    generation.py   greedy answers in batches, equal to one by one
    evaluation.py   which answers are right, and what was forgotten
"""
