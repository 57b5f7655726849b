"""What makes the files that ship: run by hand, from the root of a checkout.

    python -m tools.pretrain        tiny, from zero: tokenizer, weights, checkpoints
    python -m tools.tiny_card       its model card, data/tiny/README.md
    python -m tools.readme          the README's table, from data/results/compare.json
    python -m tools.kernels_page    docs/kernels.md, from data/results/kernels.json

Nothing in the library or in the notebooks imports these.
"""
