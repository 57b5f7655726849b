"""Pictures of ideas, drawn by code.

Reading order: code_books.py (sixteen values on a number line), rounding_pictures.py (a
block on a number line, quantiles on a curve), storage_pictures.py (codes in a byte,
constants of constants, bits per weight), page_picture.py (pages of a paged optimizer
during a step), memory_picture.py (memory over time, and what a page fault moves),
access_picture.py (which program of a kernel reads which element, and how often),
low_rank.py (thin matrices, sums of outer products), gpu_pictures.py (a GPU's memories,
masks, sums in shares), lora_bytes.py (what LoRA adds to the bytes of a product),
tuning_pictures.py and tuning_runs.py (learning rates by method, sizes by rank, targets
in a layer), family_runs.py (LoRA's relatives at one learning rate and at their own),
bfloat16_picture.py (a weight between its neighbors), step_picture.py (an optimizer
step's moments, followed and predicted, and who holds its bytes), lead_picture.py
(paired differences with intervals), size_runs.py (leads of full fine-tuning by size of
the data), soft_prompt_pictures.py (a prompt before a padded batch, attention with a
prefix, what each vector is worth), bottleneck_pictures.py (a bottleneck and a LoRA at
one projection, times of a decoding step), weight_picture.py (when a dequantized weight
exists), merge_picture.py (what rounding keeps of an update), merging_pictures.py (one
product for three, errors on a logarithmic axis, cross terms of added factors),
serving_pictures.py (ways to compute a batch with many adapters, a batch over time, a
pool, a foreign cache), fitting_pictures.py (what layers keep with checkpointing, what
ranks keep under ZeRO).
"""
