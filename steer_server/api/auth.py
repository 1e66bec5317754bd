"""Who calls and what they may: bearer tokens from a file, or the name in a client's certificate."""

import hashlib
import hmac
import logging
import re
import secrets
import time
import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any

from steer_server.errors import InvalidConfig, PermissionDenied, Unauthenticated

_log = logging.getLogger(__name__)
_RECHECK_SECONDS = 1.0
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@-]{0,63}")
_SHA256 = re.compile(r"[0-9a-f]{64}")

_Stamp = tuple[int, int, int]
Metadata = Sequence[tuple[str, str | bytes]]


class Scope(StrEnum):
    """What a token is good for."""

    INFER = "infer"
    """Generate under edits."""
    OBSERVE = "observe"
    """Read activations, from which a text can be reconstructed."""
    ADMIN = "admin"
    """Change the server for everybody."""


@dataclass(frozen=True)
class Quota:
    """Limits of one principal; None: no limit of its own."""

    max_calls: int | None = None
    max_sessions: int | None = None
    tokens_per_minute: int | None = None
    """Of prompts and answers together; a minute's worth may be used at once."""


@dataclass(frozen=True)
class Principal:
    """Who a call is made by."""

    name: str
    """Empty where nobody is told from anybody."""
    scopes: frozenset[Scope] = frozenset(Scope)
    quota: Quota = field(default_factory=Quota)


ANYONE = Principal("")

_NEEDED: Mapping[str, frozenset[Scope]] = {
    "steer.v1.SteeringService": frozenset({Scope.INFER}),
    "steer.v1.ActivationService": frozenset({Scope.OBSERVE}),
    "steer.v1.DictionaryService": frozenset({Scope.INFER, Scope.OBSERVE}),
    "steer.v1.ServerInfoService": frozenset({Scope.INFER, Scope.OBSERVE}),
    "steer.v1.AdminService": frozenset({Scope.ADMIN}),
    "grpc.reflection.v1alpha.ServerReflection": frozenset(Scope),
}
"""One of these is enough; a service that is not listed needs `admin`."""


def authorise(principal: Principal, service: str) -> None:
    """PermissionDenied unless a scope of the principal opens the service."""
    needed = _NEEDED.get(service, frozenset({Scope.ADMIN}))
    if not needed & principal.scopes:
        wanted = " or ".join(sorted(needed))
        raise PermissionDenied(
            f"{service} needs scope {wanted}; {principal.name!r} has {_listed(principal.scopes)}"
        )


def require(principal: Principal, scope: Scope, *, field: str, why: str) -> None:
    """PermissionDenied unless the principal has the scope; `field` is what asks for it."""
    if scope not in principal.scopes:
        raise PermissionDenied(
            f"needs scope {scope}, {why}; {principal.name!r} has {_listed(principal.scopes)}",
            field=field,
        )


def bearer_token(metadata: Metadata) -> str:
    """The token of `authorization: Bearer TOKEN`; Unauthenticated if there is none."""
    values = [value for key, value in metadata if key == "authorization"]
    if len(values) != 1:
        raise Unauthenticated(
            "the server needs a token: send one metadata entry `authorization: Bearer TOKEN` "
            "(`steer --token`, or STEER_TOKEN)"
        )
    scheme, _, token = str(values[0]).partition(" ")
    if scheme.lower() != "bearer" or not token:
        raise Unauthenticated("authorization is not `Bearer TOKEN`")
    return token


class TokenFile:
    """Principals by token. The file is read anew when it changes; a bad one leaves the old in force."""

    def __init__(self, path: Path, clock: Callable[[], float] = time.monotonic) -> None:
        self._path = path
        self._clock = clock
        self._checked = clock()
        self._stamp: _Stamp | None = _stamp(path)
        self._principals = read_tokens(path)
        self._version = 0

    @property
    def version(self) -> int:
        """Another one whenever the tokens have changed."""
        self._reload_if_changed()
        return self._version

    def find(self, token: str) -> Principal:
        """Whose token it is; Unauthenticated if nobody's."""
        self._reload_if_changed()
        presented = hashlib.sha256(token.encode()).hexdigest()
        found = None
        # All of them, so that the time taken says nothing of where the match is.
        for digest, principal in self._principals.items():
            if hmac.compare_digest(digest, presented):
                found = principal
        if found is None:
            raise Unauthenticated("the token is not known; it may have been revoked")
        return found

    def _reload_if_changed(self) -> None:
        if self._clock() - self._checked < _RECHECK_SECONDS:
            return
        self._checked = self._clock()
        stamp = None
        try:
            stamp = _stamp(self._path)
            if stamp == self._stamp:
                return
            self._principals = read_tokens(self._path)
            self._version += 1
            _log.info("auth_tokens: %s has %d tokens now", self._path, len(self._principals))
        except InvalidConfig as error:
            # Once for each bad file, not once a second.
            if stamp != self._stamp:
                _log.error("auth_tokens: %s; the tokens of before stay in force", error)
        self._stamp = stamp


def read_tokens(path: Path) -> dict[str, Principal]:
    """Principals by the SHA-256 of their token; InvalidConfig says what is wrong with the file."""
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise InvalidConfig(f"{path} cannot be read: {error}", field="auth_tokens") from error
    entries = content.pop("token", [])
    if content or not isinstance(entries, list):
        raise InvalidConfig(f"{path}: nothing but [[token]] entries", field="auth_tokens")
    found: dict[str, Principal] = {}
    for index, entry in enumerate(entries):
        try:
            digest, principal = _read_entry(entry)
            if principal.name in {other.name for other in found.values()}:
                raise ValueError(f"name {principal.name!r} is taken by another entry")
            if digest in found:
                raise ValueError(f"sha256 is that of {found[digest].name!r}")
        except ValueError as error:
            raise InvalidConfig(f"{path}: token[{index}]: {error}", field="auth_tokens") from error
        found[digest] = principal
    return found


def new_token(name: str, scopes: Sequence[Scope]) -> tuple[str, str]:
    """A random token, and its entry for the file."""
    if not _NAME.fullmatch(name):
        raise InvalidConfig(f"{name!r} is not a name: {_NAME.pattern}", field="name")
    token = secrets.token_urlsafe(32)
    digest = hashlib.sha256(token.encode()).hexdigest()
    listed = ", ".join(f'"{scope}"' for scope in scopes)
    return token, f'[[token]]\nname = "{name}"\nsha256 = "{digest}"\nscopes = [{listed}]\n'


def _read_entry(entry: Any) -> tuple[str, Principal]:
    limits = ("max_calls", "max_sessions", "tokens_per_minute")
    if not isinstance(entry, dict):
        raise ValueError("is not a table")
    unknown = sorted(entry.keys() - {"name", "sha256", "scopes", *limits})
    if unknown:
        raise ValueError(f"there is no {unknown[0]}")
    name, digest, scopes = (entry.get(key) for key in ("name", "sha256", "scopes"))
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise ValueError(f"name {name!r} does not match {_NAME.pattern}")
    if not isinstance(digest, str) or not _SHA256.fullmatch(digest):
        raise ValueError("sha256 is not 64 hexadecimal digits in lower case")
    if not isinstance(scopes, list) or not scopes or any(s not in list(Scope) for s in scopes):
        raise ValueError(f"scopes {scopes!r} are not some of {_listed(frozenset(Scope))}")
    for key in limits:
        value = entry.get(key, 1)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"{key} {value!r} is not a whole number of at least 1")
    quota = Quota(*(entry.get(key) for key in limits))
    return digest, Principal(name, frozenset(map(Scope, scopes)), quota)


def _stamp(path: Path) -> _Stamp:
    try:
        stat = path.stat()
    except OSError as error:
        raise InvalidConfig(f"{path} cannot be read: {error}", field="auth_tokens") from error
    return stat.st_mtime_ns, stat.st_ino, stat.st_size


def _listed(scopes: frozenset[Scope]) -> str:
    return ", ".join(sorted(scopes))
