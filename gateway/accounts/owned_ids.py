"""Pure. Ids of what an account owns. They say which account it is, so that nobody else finds it."""

from __future__ import annotations

import functools
import hashlib

STORED_PREFIX = "resp_"
_TAG_DIGITS = 8


def stored_id(account: str, secret: str) -> str:
    """The id of an answer that a worker stores for later requests of the account."""
    return f"{STORED_PREFIX}{owner_tag(account)}{secret}"


def is_stored_id_of(account: str, given: str) -> bool:
    """Whether it can be the id of an answer of this account."""
    own = STORED_PREFIX + owner_tag(account)
    return given.startswith(own) and len(given) > len(own)


@functools.lru_cache(maxsize=4096)
def owner_tag(account: str) -> str:
    digest = hashlib.blake2b(f"owner {account}".encode(), digest_size=_TAG_DIGITS // 2)
    return digest.hexdigest()
