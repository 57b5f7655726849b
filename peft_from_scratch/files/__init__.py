"""Folders on disk: adapters and quantized models, written whole and read with distrust.

A folder may come from a stranger. It is hostile until proven otherwise: no pickle, no
code, and every name, shape and value is checked before a model changes. Each layout is
one that other programs read: Hugging Face PEFT's for adapters, bitsandbytes' for models
in four bits, llama.cpp's for whole models in one file.

    untrusted.py      JSON and safetensors of a stranger: the content, or a ValueError
    patterns.py       the regexes of a file, matched within a time limit
    formats.py        one row a method: its parameters and options by PEFT's names
    base_notes.py     what a file notes of its base model: vocabulary, four bits
    foreign.py        folders as other tools leave them, their names put in order
    adapter_file.py   one adapter folder, read and checked without a model
    exchange.py       save and load, between a model and an adapter folder
    combine.py        several LoRA folders into one, without a model
    pretrained.py     a base model's folder, if no tensor in it is missing
    quantized.py      a model in four bits, and its folder
    gguf_tokens.py    a tokenizer as a GGUF file has it
    gguf_file.py      a merged model and its tokenizer in one GGUF file, for llama.cpp

Reading order: from top to bottom.
"""
