"""Many adapters on one base, in one batch. Reading order:

    requests.py   what a client asks of the engine, and what comes back
    batch.py      a gathered batch: each row its adapter
    cache.py      keys and values of rows of different lengths
    skeleton.py   a model without numbers, which adapters are checked against
    pool.py       adapters in memory, within a budget of bytes
    sampling.py, text.py    the next token; tokens to text, piece by piece
    waiting.py    who comes next: fair between tenants
    engine.py     continuous batching in one thread

That is the engine. `http/` puts it behind OpenAI's API.
"""
