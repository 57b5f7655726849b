"""Names of a package that are imported when they are first asked for (PEP 562).

torch and transformers take seconds to import, and most of what starts this package (the
command line's help, a test of a text, one method) needs a part of it only.

    __getattr__, __dir__, __all__ = lazy.names({"curves": "plotting.curves"}, …)

lazy_loader does the same for the modules inside of one package; ours stand in rooms.
"""

from collections.abc import Callable, Mapping
from importlib import import_module

PACKAGE = __name__.partition(".")[0]


def names(
    modules: Mapping[str, str], members: Mapping[str, str], package: str = PACKAGE
) -> tuple[Callable, Callable, list[str]]:
    """What a package needs to offer names that it does not import by itself.

    Args
        modules  name -> the module that it is, without the package's own name
        members  name -> the module whose attribute it is, likewise
    Returns  __getattr__, __dir__ and __all__, for the package to define
    """
    offered = sorted(modules | members)

    def __getattr__(name: str):
        if name in modules:
            return import_module(f"{package}.{modules[name]}")
        if name in members:
            return getattr(import_module(f"{package}.{members[name]}"), name)
        raise AttributeError(f"module {package!r} has no attribute {name!r}")

    return __getattr__, lambda: offered, offered


def homes(groups: Mapping[str, tuple[str, ...]]) -> dict[str, str]:
    """{name: module} of {module: its names}."""
    return {name: module for module, names in groups.items() for name in names}
