"""Who may ask: keys, each of a tenant, for all adapters or some.

    {"a-long-random-text": {"tenant": "shop", "adapters": ["orders"], "admin": false}}

Only the SHA-256 digest of a key is kept, and a given key is compared with all of them
in constant time.
"""

from collections.abc import Mapping
from hashlib import sha256
from hmac import compare_digest
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ...common import records
from ...common.check import about, require

KEY = "allowed are 16 or more characters of ASCII without spaces"


class Key(BaseModel):
    """What a key allows.

    tenant    whose it is: the scheduler is fair between tenants
    adapters  the names that it may use, None for all; the base is for every key
    admin     whether it may load and unload adapters, and read the metrics
    """

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)
    tenant: str = Field(min_length=1)
    adapters: list[str] | None = None
    admin: bool = False

    def may_use(self, name: str) -> bool:
        return self.adapters is None or name in self.adapters


class Keys:
    """The keys, by their digests.

    Raises  ValueError  a key too short, an entry of other fields or types; the sentence
            names it by its number and never shows it
    """

    def __init__(self, table: Mapping[str, Mapping]):
        require(len(table) > 0, "keys", table, "allowed is one key or more")
        self._by_digest = {
            _digest(key): _checked(f"key {number}", key, entry)
            for number, (key, entry) in enumerate(table.items(), 1)
        }

    def of(self, header: str) -> Key | None:
        """The key in `Authorization: Bearer …`; None for a wrong one or none."""
        scheme, _, text = header.partition(" ")
        given, match = _digest(text.strip()), None
        for digest, key in self._by_digest.items():  # all: no time tells which
            if compare_digest(digest, given):
                match = key
        return match if scheme.lower() == "bearer" else None


def read_keys(file: str | Path) -> Keys:
    """The keys of a JSON file; ValueError names the file, OSError if it cannot open."""
    table = records.read_object(Path(file))
    with about(str(file)):
        return Keys(table)


def _digest(key: str) -> bytes:
    return sha256(key.encode("utf-8", "surrogatepass")).digest()


def _checked(name: str, key: str, entry: object) -> Key:
    fine = len(key) >= 16 and key.isascii() and key.isprintable() and " " not in key
    require(fine, name, f"{len(key)} characters", KEY)
    try:
        return Key.model_validate(entry)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise ValueError(f"{name}: {place}: {first['msg'].lower()}") from None
