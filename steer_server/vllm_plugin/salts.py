"""Names the KV blocks that equal programs share, and names them anew once a row among them was left unedited.

vLLM lets others have a prompt's blocks before the pass that fills them has run. If that pass refuses an edit, or misses
one, its request fails; the blocks stay, and whoever took them would run unedited at that row.
"""

import secrets
from collections.abc import Iterable
from typing import NamedTuple

from steer_server.vllm_plugin.account import Account

_RENAMED, _ENDED = 4096, 256
"""Keys with a name of their own, and ended requests whose last reports may still be under way."""


class _Given(NamedTuple):
    key: str
    salt: str
    account: Account


class Salts:
    """One per front-end. No request can bring a salt that another will be given."""

    def __init__(self) -> None:
        self._secret = secrets.token_hex(16)
        self._renamed: dict[str, str] = {}
        """What the salt of a key ends in, since the one before is not to be trusted."""
        self._given: dict[str, _Given] = {}
        """By vLLM's id, of the requests it has in hand."""
        self._ended: dict[str, _Given] = {}

    def give(self, vllm_id: str, key: str, account: Account) -> str:
        """The `cache_salt` of a new request: the same as that of others with this key, as long as none was spoilt."""
        given = self._given[vllm_id] = _Given(key, self._salt(key), account)
        return given.salt

    def end(self, vllm_ids: Iterable[str]) -> None:
        """vLLM is done with the requests; a report may still come."""
        for vllm_id in vllm_ids:
            given = self._given.pop(vllm_id, None)
            if given is not None:
                self._ended[vllm_id] = given
        while len(self._ended) > _ENDED:
            del self._ended[next(iter(self._ended))]

    def spoil(self, vllm_id: str, position: int) -> list[Account]:
        """The request's row at `position` was left unedited: nobody gets its salt any more.

        Returns the accounts of those that have it, are in hand, and read the same tokens up to that row.
        """
        given = self._given.get(vllm_id) or self._ended.get(vllm_id)
        if given is None:
            return []
        if self._salt(given.key) == given.salt:
            if len(self._renamed) == _RENAMED:
                # All names anew take no memory.
                self._renamed.clear()
                self._secret = secrets.token_hex(16)
            else:
                self._renamed[given.key] = secrets.token_hex(8)
        read = given.account.tokens(0, position + 1)
        return [
            other.account
            for other in self._given.values()
            if other.salt == given.salt
            and other.account is not given.account
            and other.account.tokens(0, position + 1) == read
        ]

    def _salt(self, key: str) -> str:
        return f"{key}{self._secret}{self._renamed.get(key, '')}"
