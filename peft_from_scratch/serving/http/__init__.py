"""The engine over HTTP, in OpenAI's words. Reading order:

    keys.py       who may ask, and for which adapters
    protocol.py   OpenAI's wire format, checked strictly
    door.py       the key first, then a small body; folders that lead nowhere else
    prompts.py    from texts to tokens, as the adapter was trained
    answer.py     pieces as JSON or as events; a client that leaves cancels them
    metrics.py    what Prometheus reads
    server.py     the routes
    page.html     two adapters side by side, in a browser

These files take the extra `serve`; the engine does without FastAPI, and knows none of
them.
"""
