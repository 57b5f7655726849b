"""Paged AdamW: the optimizer's states live in a file, a few pages of them in memory.

AdamW keeps two numbers for every one that it trains, twice the bytes of the weights.
They are needed once a step, one after the other, so not all of them have to be in
memory. QLoRA (arXiv:2305.14314, section 3) pages them between GPU and host. Here paging
is written out, on any machine, and can be watched: who is resident, who leaves, what is
copied.

A *page* holds all states (m, v, and the largest v with amsgrad) of one slice of one
parameter. A step walks over the pages: bring some in, update their slice of the
weights, go on. Every operation of AdamW is elementwise, so no slice needs another one.
The weights are those of torch.optim.AdamW(foreach=False), bit for bit, whatever the
budget; with fused=True those of torch.optim.AdamW(fused=True), in less time.

    adamw      the equations, on one slice; torch's fused kernel on slices     adamw.py
    pages      who is resident, who leaves: LRU, dirty bits, counters          pages.py
    stores     where all other pages are: a file, or pinned host memory       stores.py
    layout     a parameter's states, cut into pages                           layout.py
    states     checks of settings and gradients; state dicts                  states.py
    optimizer  PagedAdamW: the walk over the pages                         optimizer.py

Paged *attention* is another thing: it keeps the keys and values of a serving engine in
blocks (arXiv:2309.06180).
"""

from .optimizer import PAGE_BYTES, PagedAdamW, PageEntry
from .pages import Counters

__all__ = ["PAGE_BYTES", "Counters", "PageEntry", "PagedAdamW"]
