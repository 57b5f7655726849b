"""A disk that takes no more: the system itself refuses, by a limit on files."""

import signal
from contextlib import contextmanager

import pytest


@contextmanager
def files_of_at_most(size):
    """Inside, a write past this many bytes of any file is an error of the system."""
    resource = pytest.importorskip("resource")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)
