"""Where the bytes of a training step go, by measurement and by formula.

    meter.py        follows every tensor of a step: weights, gradients, optimizer,
                    activations, and the peak of their sum
    formulas.py     the same for LoRA and AdamW with pencil and paper
    step_bill.py    one step as a bill: learning and updating, counted one by one
    mixed_adamw.py  AdamW on float32 masters of half-precision weights
    meta_model.py   a model without numbers, whose step can be counted at any size
    zero.py         ZeRO: N ranks, each with a part of states, gradients and weights
    shards.py       a parameter in N parts, gathered where a module reads it
    collectives.py  what the ranks send to each other, around a ring

And the bill of a step that nobody has taken yet, predicted from a config.json:

    setups.py       what is asked for: method, recipe of dtypes, batch, devices
    shapes.py       the sizes in a configuration
    weighing.py     what a method trains and leaves frozen, counted without numbers
    steps.py        what a step reads, and what trains in it
    activations.py  what a layer keeps for backward, tensor by tensor, as a formula
    temporaries.py  what comes and goes inside a layer, estimated
    pieces.py       the bytes that the moments of a step are put together from
    timeline.py     the moments of a step, and which of them is the peak
    budget.py       the bill
    changes.py      what fits, and which single change saves most
    bill_text.py    the bill as text and as a figure

Read activations.py first, then timeline.py. docs/memory_budget.md has what was
predicted beside what was measured.

Resident memory of the process is no measurement of a step on a CPU: it depends on the
allocator, on what ran before and on when the system takes pages back. So bytes are
counted, tensor by tensor, and the count is the same on every device and in every run.
"""
