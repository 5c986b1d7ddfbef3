"""Pure. The key ring: SHA-256 digests of the valid keys, and the account of each. A ring never
changes; a changed key file makes a new ring.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Iterable, Mapping

from gateway.accounts.account import ANONYMOUS, Account
from shared.errors import Forbidden, InvalidApiKey

WRONG_KEY = "Missing or wrong API key; send `Authorization: Bearer KEY`."
LOOKED_UP_BYTES = 8
"""The candidate is found by the first bytes of a digest. Then the whole digest is compared in
constant time.
"""


def digest_of(key: str) -> bytes:
    """The digest of a key. Bytes of a header that are not UTF-8 come as lone surrogates; they are
    turned back into bytes first.
    """
    return hashlib.sha256(key.strip().encode("utf-8", "surrogateescape")).digest()


def bearer_digest(authorization: str) -> bytes | None:
    """The digest of the key in an Authorization header's value. None: it holds no bearer key."""
    kind, _, key = authorization.strip().partition(" ")
    key = key.strip()
    return digest_of(key) if key and kind.lower() == "bearer" else None


def plain_accounts(digests: Iterable[bytes]) -> dict[bytes, Account]:
    """Accounts for plain lists of keys. Each has no limits, and a part of the digest as its
    name.
    """
    return {digest: Account(name=digest.hex()[:16]) for digest in digests}


class KeyRing:
    """Without keys of clients, clients need none.

    Args:
        clients: digest -> account.
        admins: the digests of operators' keys.
        local: only this machine can reach the gateway. If there are no admin keys, operators then
            need no key, or a client's key if there are any.
        asks: clients need a key, even if no key is valid at present.
        apart: tenants must learn nothing of each other. So only operators see metrics by tenant,
            and no client's key is an operator's.
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
        """The account behind an Authorization header. `now` is in seconds of the Unix epoch.

        Raises InvalidApiKey.
        """
        if not self.asks:
            return ANONYMOUS
        account = _find(self._clients, bearer_digest(authorization))
        if account is None:
            raise InvalidApiKey(WRONG_KEY)
        if now >= account.expires:
            raise InvalidApiKey("This API key has expired.")
        return account

    def is_admin(self, authorization: str) -> bool:
        return _find(self._admins, bearer_digest(authorization)) is not None

    def sees_tenants(self, authorization: str, now: float) -> bool:
        """Whether who sends this may see the names of tenants and of what they use."""
        if not self.asks or self.is_admin(authorization):
            return True
        account = _find(self._clients, bearer_digest(authorization))
        return not self.apart and account is not None and now < account.expires

    def check_admin(self, authorization: str, now: float) -> None:
        """Raises InvalidApiKey if the key is missing or wrong. Raises Forbidden if it is a client's
        key, or if no key at all is allowed to do this.
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
        if self.apart:
            raise Forbidden(
                "Keys of a keys_file belong to tenants, and none of them opens this: "
                "set gateway.admin_keys_env or admin_keys_file."
            )
        self.account_of(authorization, now)


def _find(keys: Mapping[bytes, tuple[bytes, Account]], digest: bytes | None) -> Account | None:
    if digest is None:
        return None
    whole, account = keys.get(digest[:LOOKED_UP_BYTES], (b"", ANONYMOUS))
    return account if hmac.compare_digest(whole, digest) else None
