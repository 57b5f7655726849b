"""Several processes, called ranks, train one model together.

    python -m peft_from_scratch train --data terms --method lora --out DIR \\
        --engine zero --stage 2 --ranks 2

Every rank trains its share of each batch with the same loop, training/loop.py, and the
ranks take one optimizer step together. Who cuts what, and who sends what to whom, is
the engine's affair: an engine is what `train(..., engine=…)` takes.

    group.py             the ranks of this run: sums over them, waiting for one another
    state.py             what the loop asks, answered by one rank of several
    twin.py              the copy of a model that an engine takes apart
    zero_engine.py       Zero(stage): our own ZeRO, memory/zero.py
    fsdp2.py             FSDP2(): torch's fully_shard
    deepspeed_engine.py  DeepSpeed(stage): DeepSpeed, where it is installed
    engines.py           their names on the command line
    launch.py            starts the ranks on this machine, and says which one has failed

Read state.py first, then zero_engine.py. docs/many_devices.md says how to start 8 and
64 ranks, and what was measured.

**The mean of means.** A loss is a mean over label tokens, and ranks do not have equally
many: a mean of the ranks' means would weigh the tokens of short answers more. So a
rank's sum is divided by the label tokens of *all* ranks. Engines average gradients over
the N ranks, and each rank's part is therefore multiplied by N first:

    g = 1/N Σ_rank ∇ (N / tokens of all ranks) Σ_own tokens loss  =  ∇ mean over tokens
"""
