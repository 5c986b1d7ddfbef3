"""Pure. Keys as SHA-256 digests, and which account each belongs to. A ring does not change; a new
key file makes a new ring.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Iterable, Mapping

from gateway.accounts.account import ANONYMOUS, Account
from shared.errors import Forbidden, InvalidApiKey

WRONG_KEY = "Missing or wrong API key; send `Authorization: Bearer KEY`."
LOOKED_UP_BYTES = 8
"""Of a digest, to find its candidate; the whole is then compared in constant time."""


def digest_of(key: str) -> bytes:
    """Header values hold bytes that are no UTF-8 as lone surrogates; they are bytes again here."""
    return hashlib.sha256(key.strip().encode("utf-8", "surrogateescape")).digest()


def bearer_digest(authorization: str) -> bytes | None:
    """Of the key in an Authorization header's value, however the header spells it."""
    kind, _, key = authorization.strip().partition(" ")
    key = key.strip()
    return digest_of(key) if key and kind.lower() == "bearer" else None


def plain_accounts(digests: Iterable[bytes]) -> dict[bytes, Account]:
    """For plain lists of keys: each is an account without limits, called by its digest."""
    return {digest: Account(name=digest.hex()[:16]) for digest in digests}


class KeyRing:
    """No clients' keys: nobody is asked for one.

    Args:
        clients: digest -> account.
        admins: digests of operators' keys.
        local: only this machine reaches the gateway. Without admin keys that, and a client's key
            where there are any, is what operators need.
        asks: clients need a key, even if none is valid now.
        apart: tenants learn nothing of each other, so metrics by tenant are for operators.
    """

    def __init__(
        self,
        clients: Mapping[bytes, Account] | None = None,
        admins: Iterable[bytes] = (),
        *,
        local: bool = True,
        asks: bool = False,
        apart: bool = False,
    ) -> None:
        clients = clients or {}
        self.asks = asks or bool(clients)
        self.apart = apart
        self.accounts = {account.name: account for account in clients.values()}
        self._clients = {d[:LOOKED_UP_BYTES]: (d, account) for d, account in clients.items()}
        self._admins = {d[:LOOKED_UP_BYTES]: (d, ANONYMOUS) for d in admins}
        self._local = local

    def account_of(self, authorization: str, now: float) -> Account:
        """`now` is in seconds of the Unix epoch. Raises InvalidApiKey."""
        if not self.asks:
            return ANONYMOUS
        account = _find(self._clients, bearer_digest(authorization))
        if account is None or now >= account.expires:
            raise InvalidApiKey(WRONG_KEY if account is None else "This API key has expired.")
        return account

    def is_admin(self, authorization: str) -> bool:
        return _find(self._admins, bearer_digest(authorization)) is not None

    def check_admin(self, authorization: str, now: float) -> None:
        """Raises InvalidApiKey, or Forbidden where another key would not help or a client's does
        not suffice.
        """
        if self._admins:
            if self.is_admin(authorization):
                return
            if _find(self._clients, bearer_digest(authorization)) is not None:
                raise Forbidden(
                    "An ordinary API key does not suffice here; send one of "
                    "gateway.admin_keys_env or admin_keys_file."
                )
            raise InvalidApiKey("Missing or wrong admin key; send `Authorization: Bearer KEY`.")
        if not self._local:
            raise Forbidden(
                "This gateway is reachable from other machines and has no admin keys: "
                "set gateway.admin_keys_env or admin_keys_file."
            )
        self.account_of(authorization, now)


def _find(keys: Mapping[bytes, tuple[bytes, Account]], digest: bytes | None) -> Account | None:
    if digest is None:
        return None
    whole, account = keys.get(digest[:LOOKED_UP_BYTES], (b"", ANONYMOUS))
    return account if hmac.compare_digest(whole, digest) else None
