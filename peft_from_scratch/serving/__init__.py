"""Many adapters on one base, in one batch, over HTTP. Reading order:

    requests.py   what a client asks of the engine, and what comes back
    batch.py      a gathered batch: each row its adapter
    cache.py      keys and values of rows of different lengths
    skeleton.py   a model without numbers, which adapters are checked against
    pool.py       adapters in memory, within a budget of bytes
    sampling.py, text.py    the next token; tokens to text, piece by piece
    waiting.py    who comes next: fair between tenants
    engine.py     continuous batching in one thread
    keys.py       who may ask, and for which adapters
    protocol.py   OpenAI's wire format, checked strictly
    door.py       the key first, then a small body; folders that lead nowhere else
    prompts.py    from texts to tokens, as the adapter was trained
    answer.py     pieces as JSON or as events; a client that leaves cancels them
    metrics.py    what Prometheus reads
    server.py     the routes
    page.html     two adapters side by side, in a browser

The files from keys.py on take the extra `serve`; the others do without FastAPI.
"""
