"""The bar of everything that takes long: how far it is, and the time left."""

from tqdm.auto import tqdm


def bar(what: str, unit: str, total: int, *, done: int = 0, shown: bool = True) -> tqdm:
    """A bar in a terminal or a notebook; none where nobody can see it.

    Args
        done   units that an earlier, interrupted call did
        shown  False for no bar anywhere
    """
    return tqdm(
        desc=what,
        unit=unit,
        total=total,
        initial=done,
        dynamic_ncols=True,
        disable=None if shown else True,  # None: only where somebody can see it
    )
