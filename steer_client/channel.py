"""How the client reaches a server: TLS, and a token where nobody else can read it."""

import ipaddress
import re
from dataclasses import dataclass
from pathlib import Path

import grpc

_OPTIONS = (
    ("grpc.max_receive_message_length", 16 << 20),
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_timeout_ms", 10_000),
)
_SCHEME = re.compile(r"^(?:dns:(?://[^/]*/)?|ipv4:|ipv6:(?://)?)")


@dataclass(frozen=True)
class Tls:
    """Files in PEM. Without `ca` the system's authorities vouch for the server."""

    ca: Path | str | None = None
    cert: Path | str | None = None
    """The client's own certificate, for a server that asks for one; it needs `key`."""
    key: Path | str | None = None

    def credentials(self) -> grpc.ChannelCredentials:
        """For a channel; ValueError if a file is missing or half of the pair is."""
        if (self.cert is None) != (self.key is None):
            missing = "key" if self.key is None else "certificate"
            raise ValueError(f"a client certificate comes with its key; the {missing} is missing")
        try:
            ca, key, cert = (
                Path(file).read_bytes() if file is not None else None
                for file in (self.ca, self.key, self.cert)
            )
        except OSError as error:
            raise ValueError(f"TLS file cannot be read: {error}") from error
        return grpc.ssl_channel_credentials(ca, key, cert)


def open_channel(target: str, tls: Tls | None, token: str | None) -> grpc.aio.Channel:
    """A channel; ValueError if `token` would travel in the clear to another machine."""
    if tls is not None:
        return grpc.aio.secure_channel(target, tls.credentials(), options=_OPTIONS)
    if token and not is_loopback(target):
        raise ValueError(
            f"the token is not sent to {target}: without TLS anybody on the way could read it; "
            "use TLS (--tls or --tls-ca), or a server on this machine"
        )
    return grpc.aio.insecure_channel(target, options=_OPTIONS)


def call_metadata(token: str | None) -> tuple[tuple[str, str], ...]:
    """What each call carries; ValueError if `token` cannot be a token."""
    if not token:
        return ()
    if not (token.isascii() and token.isprintable()) or " " in token:
        raise ValueError("a token is printable ASCII without spaces")
    return (("authorization", f"Bearer {token}"),)


def is_loopback(target: str) -> bool:
    """Whether the target is certainly this machine."""
    if target.startswith(("unix:", "unix-abstract:")):
        return True
    address = _SCHEME.sub("", target)
    host = address.rpartition(":")[0] if address.count(":") == 1 or "]:" in address else address
    host = host.strip("[]")
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
