"""TLS and client certificates, over real handshakes."""

import asyncio
import sys
from pathlib import Path

import grpc
import pytest

from steer_client import CallFailed, SteerClient, Tls
from steer_client.channel import is_loopback
from steer_server.api.tls import TlsFiles, tls_files
from steer_server.errors import InvalidConfig
from tests.unit.certificates import Authority, Pair
from tests.unit.serving import NAME, serving


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("authority"))


@pytest.fixture
def server(authority: Authority) -> Pair:
    return authority.issue("server")


async def names(target: str, **access) -> list[str]:
    async with SteerClient(target, timeout=5, **access) as client:
        return [entry.name for entry in await client.dictionaries()]


async def test_calls_come_over_tls_and_in_no_other_way(authority: Authority, server: Pair):
    async with serving(tls=TlsFiles(server.cert, server.key)) as service:
        assert await names(service.target, tls=Tls(authority.cert)) == [NAME]

        with pytest.raises(CallFailed) as in_the_clear:
            await names(service.target)
    assert in_the_clear.value.code is grpc.StatusCode.UNAVAILABLE


async def test_a_client_does_not_talk_to_a_server_that_its_authorities_do_not_know(
    server: Pair, tmp_path: Path
):
    stranger = Authority(tmp_path, "stranger")
    async with serving(tls=TlsFiles(server.cert, server.key)) as service:
        with pytest.raises(CallFailed) as refused:
            await names(service.target, tls=Tls(stranger.cert))

    assert refused.value.code is grpc.StatusCode.UNAVAILABLE


async def test_only_clients_with_a_certificate_of_the_authority_get_in(
    authority: Authority, server: Pair, tmp_path: Path
):
    known = authority.issue("client")
    stranger = Authority(tmp_path, "stranger").issue("client")
    files = TlsFiles(server.cert, server.key, client_ca=authority.cert)

    async with serving(tls=files) as service:
        assert await names(service.target, tls=Tls(authority.cert, known.cert, known.key)) == [NAME]
        for pair in ((), (stranger.cert, stranger.key)):
            with pytest.raises(CallFailed) as refused:
                await names(service.target, tls=Tls(authority.cert, *pair))
            assert refused.value.code is grpc.StatusCode.UNAVAILABLE


async def test_a_renewed_certificate_is_served_without_a_restart_and_a_bad_one_is_not(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    before, after = (Authority(tmp_path, name) for name in ("before", "after"))
    pair = before.issue("server")
    async with serving(tls=TlsFiles(pair.cert, pair.key)) as service:
        pair.key.write_text("not a key")
        assert await names(service.target, tls=Tls(before.cert)) == [NAME]
        assert "the old certificate stays in use" in caplog.text

        after.issue("server")
        assert await names(service.target, tls=Tls(after.cert)) == [NAME]


@pytest.mark.parametrize(
    ("given", "key", "said"),
    [
        ({"cert"}, "tls_key", "required with tls_cert"),
        ({"key"}, "tls_cert", "required with tls_key"),
        ({"client_ca"}, "tls_cert", "required with tls_client_ca"),
    ],
)
def test_half_of_a_pair_is_refused_by_the_key_that_lacks(
    server: Pair, given: set[str], key: str, said: str
):
    every = {"cert": server.cert, "key": server.key, "client_ca": server.cert}
    files = {name: path if name in given else None for name, path in every.items()}

    with pytest.raises(InvalidConfig, match=said) as caught:
        tls_files(**files)

    assert caught.value.field == key


@pytest.mark.parametrize("wrong", ["cert", "key", "client_ca"])
@pytest.mark.parametrize("content", [None, "nothing in PEM"])
def test_a_file_that_cannot_be_used_is_refused_by_its_key(
    server: Pair, tmp_path: Path, wrong: str, content: str | None
):
    files = {"cert": server.cert, "key": server.key, "client_ca": server.cert}
    files[wrong] = tmp_path / "wrong.pem"
    if content is not None:
        files[wrong].write_text(content)

    with pytest.raises(InvalidConfig) as caught:
        tls_files(**files)

    # OpenSSL does not say which of a pair it cannot read.
    pair = content is not None and wrong != "client_ca"
    assert caught.value.field == ("tls_key" if pair else f"tls_{wrong}")
    assert "wrong.pem" in str(caught.value)


def test_a_key_of_another_certificate_is_refused(authority: Authority, server: Pair):
    other = authority.issue("other")

    with pytest.raises(InvalidConfig, match="is not the key of the certificate") as caught:
        tls_files(server.cert, other.key, None)

    assert caught.value.field == "tls_key"


def test_no_files_are_no_tls():
    assert tls_files(None, None, None) is None


@pytest.mark.parametrize(
    ("target", "here"),
    [
        ("localhost:50051", True),
        ("127.3.2.1:1", True),
        ("[::1]:1", True),
        ("dns:///localhost:1", True),
        ("ipv4:127.0.0.1:1", True),
        ("unix:/run/steer", True),
        ("10.0.0.1:1", False),
        ("example.org:1", False),
        ("localhost.example.org:1", False),
        ("dns:///example.org:1", False),
    ],
)
def test_a_target_is_loopback_only_if_it_certainly_is(target: str, here: bool):
    assert is_loopback(target) is here


async def test_a_token_in_the_clear_goes_to_this_machine_only():
    with pytest.raises(ValueError, match=r"not sent to example\.org:1.*--tls"):
        SteerClient("example.org:1", token="secret")

    async with SteerClient("localhost:1", token="secret"):
        pass
    async with SteerClient("example.org:1", token="secret", tls=Tls()):
        pass


@pytest.mark.parametrize("token", ["two words", "zeile\n", "höchst"])
def test_what_cannot_be_a_token_is_refused(token: str):
    with pytest.raises(ValueError, match="printable ASCII"):
        SteerClient("localhost:1", token=token)


async def test_the_command_takes_tls_files(authority: Authority, server: Pair):
    async with serving(tls=TlsFiles(server.cert, server.key)) as service:
        good, half, clear = await asyncio.gather(
            *(
                steer("dictionaries", "--timeout", "5", *flags)
                for flags in (
                    ("--server", service.target, "--tls-ca", str(authority.cert)),
                    ("--server", service.target, "--tls", "--tls-cert", str(server.cert)),
                    ("--server", "example.org:1", "--token", "secret"),
                )
            )
        )

    assert good[0] == 0
    assert good[1].startswith(NAME)
    assert half == (2, "", "steer: a client certificate comes with its key; the key is missing\n")
    assert clear[0] == 2
    assert "the token is not sent to example.org:1" in clear[2]


async def steer(*arguments: str) -> tuple[int, str, str]:
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "steer_client", *arguments),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    out, err = await process.communicate()
    return process.returncode or 0, out.decode(), err.decode()
