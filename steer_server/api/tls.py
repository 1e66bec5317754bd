"""The server's certificate: checked when it starts, read anew when its files change."""

import logging
import ssl
from dataclasses import dataclass
from pathlib import Path

import grpc

from steer_server.errors import InvalidConfig

_log = logging.getLogger(__name__)
_Stamp = tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class TlsFiles:
    """PEM files of a certificate chain, its key, and the authorities that clients' certificates need."""

    cert: Path
    key: Path
    client_ca: Path | None = None
    """None: clients show no certificate."""


def tls_files(cert: Path | None, key: Path | None, client_ca: Path | None) -> TlsFiles | None:
    """The files that the settings name, checked; None if they name none. InvalidConfig names a key."""
    if cert and not key:
        raise InvalidConfig("required with tls_cert: the PEM file of its key", field="tls_key")
    if not cert and (key or client_ca):
        given = "tls_key" if key else "tls_client_ca"
        raise InvalidConfig(f"required with {given}: a PEM certificate", field="tls_cert")
    if not (cert and key):
        return None
    files = TlsFiles(cert, key, client_ca)
    _check(files)
    return files


def credentials(files: TlsFiles) -> grpc.ServerCredentials:
    """For a port. New handshakes use what the files hold by then, as long as that is sound."""
    return grpc.dynamic_ssl_server_credentials(
        _configuration(files),
        _Renewal(files).changed,  # pyright: ignore[reportArgumentType] - None is right, says its docstring
        require_client_authentication=files.client_ca is not None,
    )


class _Renewal:
    def __init__(self, files: TlsFiles) -> None:
        self._files = files
        self._stamp = _stamp(files)

    def changed(self) -> grpc.ServerCertificateConfiguration | None:
        """Called by gRPC, in a thread of its own, before each handshake; None keeps what it has."""
        try:
            stamp = _stamp(self._files)
            if stamp == self._stamp:
                return None
            self._stamp = stamp
            _check(self._files)
            renewed = _configuration(self._files)
        except (InvalidConfig, OSError) as error:
            _log.error("the old certificate stays in use: %s", error)
            return None
        _log.info("the certificate in %s was renewed", self._files.cert)
        return renewed


def _stamp(files: TlsFiles) -> _Stamp:
    paths = (files.cert, files.key, files.client_ca)
    stats = [path.stat() for path in paths if path]
    return tuple((stat.st_mtime_ns, stat.st_ino) for stat in stats)


def _configuration(files: TlsFiles) -> grpc.ServerCertificateConfiguration:
    pair = (files.key.read_bytes(), files.cert.read_bytes())
    authorities = files.client_ca.read_bytes() if files.client_ca else None
    return grpc.ssl_server_certificate_configuration([pair], authorities)


def _check(files: TlsFiles) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    for key, path in (("tls_cert", files.cert), ("tls_key", files.key)):
        _readable(path, key)
    try:
        context.load_cert_chain(files.cert, files.key, password=_no_passphrase)
    except (ssl.SSLError, ValueError) as error:
        raise InvalidConfig(
            f"{files.key} is not the key of the certificate in {files.cert}, or one of them is not "
            f"PEM, or the key has a passphrase: {error}",
            field="tls_key",
        ) from error
    if files.client_ca:
        _readable(files.client_ca, "tls_client_ca")
        try:
            context.load_verify_locations(files.client_ca)
        except ssl.SSLError as error:
            raise InvalidConfig(
                f"{files.client_ca} holds no PEM certificate: {error}", field="tls_client_ca"
            ) from error


def _readable(path: Path, key: str) -> None:
    try:
        path.read_bytes()
    except OSError as error:
        raise InvalidConfig(f"cannot be read: {error}", field=key) from error


def _no_passphrase() -> str:
    # Without it OpenSSL would ask the terminal.
    raise ValueError("the key has a passphrase")
