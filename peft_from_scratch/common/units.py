"""Bytes as text: GB of 10^9 bytes and MB of 10^6, without the unit's name.

A table names the unit in its head, a sentence after the number; so the caller does.
Experiments write the bytes of their verdicts themselves: how a rule rounds is part of
the rule, and of its hash.
"""

GB, MB = 1e9, 1e6  # bytes


def gigabytes(count: float, digits: str = ".1f") -> str:
    """Bytes in GB: gigabytes(16_533_000_000) is "16.5".

    Args
        digits  how many, in Python's format language: ".2g" for two that count
    """
    return format(count / GB, digits)


def megabytes(count: float, digits: str = ".1f") -> str:
    """Bytes in MB: megabytes(1_250_000) is "1.2"."""
    return format(count / MB, digits)
