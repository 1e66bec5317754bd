"""Names the KV blocks that equal programs share, and names them anew once a row among them was left unedited.

vLLM lets others have a prompt's blocks before the pass that fills them has run. If that pass refuses an edit, or misses
one, its request fails; the blocks stay, and whoever took them would run unedited at that row.
"""

import secrets
from array import array
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from vllm.v1.engine import EngineCoreRequest

from steer_server.vllm_plugin.account import Account

_RENAMED, _ENDED = 4096, 256
"""Keys with a name of their own, and ended requests whose last reports may still be under way."""

_Key = tuple[Any, ...]
"""What requests that share blocks have in common, their tokens and images aside."""


@dataclass(slots=True)
class _Given:
    key: _Key
    salt: str
    account: Account
    images: tuple[tuple[int, str], ...] = ()
    """Where each begins, and vLLM's name of it, which the blocks behind it are told apart by."""
    unedited: int | None = None
    """The first position that is known to have been left so."""


class Salts:
    """One per front-end. No request can bring a salt that another will be given."""

    def __init__(self) -> None:
        self._secret = secrets.token_hex(16)
        self._renamed: dict[_Key, str] = {}
        """What the salt of a key ends in, since the one before is not to be trusted."""
        self._given: dict[str, _Given] = {}
        """By vLLM's id, of the requests it has in hand."""
        self._ended: dict[str, _Given] = {}

    def give(self, request: EngineCoreRequest, edits: str, account: Account) -> str:
        """The `cache_salt` of a new request: the same as that of others with these `edits`, as long as none was spoilt."""
        lora = request.lora_request
        key = edits, lora and (lora.lora_name, lora.lora_path)
        given = _Given(key, self._salt(key), account, _images(request))
        self._given[request.request_id] = given
        return given.salt

    def end(self, vllm_ids: Iterable[str]) -> None:
        """vLLM is done with the requests; a report may still come."""
        for vllm_id in vllm_ids:
            given = self._given.pop(vllm_id, None)
            if given is not None:
                # All else of the account may be large.
                account = given.account
                tokens = array(
                    "i", account.tokens(0, account.prompt_length + len(account.token_ids))
                )
                given.account = Account(tokens, [])
                self._ended[vllm_id] = given
        while len(self._ended) > _ENDED:
            del self._ended[next(iter(self._ended))]

    def spoil(self, vllm_id: str, position: int) -> list[Account]:
        """The request's row at `position` was left unedited: nobody gets its salt any more.

        Returns the accounts of those that have it, are in hand, and read the same tokens up to that row, as far as those
        are known: a request's may end before the steps that were under way.
        """
        given = self._given.get(vllm_id) or self._ended.get(vllm_id)
        if given is None or (given.unedited is not None and given.unedited <= position):
            return []
        given.unedited = position
        if self._salt(given.key) == given.salt:
            if len(self._renamed) == _RENAMED:
                # All names anew take no memory.
                self._renamed.clear()
                self._secret = secrets.token_hex(16)
            else:
                self._renamed[given.key] = secrets.token_hex(8)
        read, seen = given.account.tokens(0, position + 1), _until(position, given)
        last = len(read) - 1
        return [
            other.account
            for other in self._given.values()
            if other.salt == given.salt
            and other.key == given.key
            and other is not given
            # Most differ there, and then the rest is not looked at.
            and other.account.tokens(last, last + 1) == read[-1:]
            and other.account.tokens(0, last + 1) == read
            and _until(position, other) == seen
        ]

    def _salt(self, key: _Key) -> str:
        return f"{key[0]}{self._secret}{self._renamed.get(key, '')}"


def _images(request: EngineCoreRequest) -> tuple[tuple[int, str], ...]:
    features = request.mm_features or ()
    return tuple(sorted((entry.mm_position.offset, entry.identifier) for entry in features))


def _until(position: int, given: _Given) -> tuple[tuple[int, str], ...]:
    """The images that a row at `position` has seen."""
    return tuple(image for image in given.images if image[0] <= position)
