"""What makes the files that ship: run by hand, from the root of a checkout.

    python -m tools.pretrain        tiny, from zero: tokenizer, weights, checkpoints
    python -m tools.tiny_card       its model card, data/tiny/README.md
    python -m tools.readme          the README's table, from data/results/compare.json
    python -m tools.kernels_page    docs/kernels.md, from data/results/kernels.json
    python -m tools.memory_page     docs/memory_budget.md, bills beside measured steps
    python -m tools.memory_questions  docs/memory_questions.md, answered by `budget`

And what tries the library on models that do not ship:

    python -m tools.architectures   every method on every type of language model

Nothing in the library or in the notebooks imports these.
"""
