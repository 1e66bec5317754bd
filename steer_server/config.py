"""The server's settings: from a TOML file, the environment and flags, in rising order of weight."""

import ipaddress
import json
import math
import os
import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from steer_server.dictionary.site import SERVED, Site
from steer_server.errors import InvalidConfig, SteerError
from steer_server.logs import LOG_FORMATS

DTYPES = ("auto", "float32", "bfloat16", "float16")
MAX_WATCHED = 100
_WATCHED = re.compile(r"([^:]+):([0-9]+)")


@dataclass(frozen=True)
class DictionarySource:
    """A folder to load a dictionary from."""

    folder: Path
    name: str = ""
    """What requests call it; empty takes the card's name."""

    def __str__(self) -> str:
        return f"{self.name}={self.folder}" if self.name else str(self.folder)


@dataclass(frozen=True)
class ServerConfig:
    """Everything `steer-server` can be told."""

    model: str
    """Hugging Face folder or hub id."""
    dictionaries: tuple[DictionarySource, ...] = ()
    dictionary_root: Path | None = None
    """Folder whose dictionaries may be loaded while the server runs; None: none may."""
    sites: tuple[Site, ...] = ()
    """Where the model can be read and edited; empty: the sites of the dictionaries."""
    presets: Path | None = None
    """TOML file of named sets of edits; see `api.presets`."""
    watch: tuple[tuple[str, int], ...] = ()
    """Features whose activations become metrics, by dictionary and index."""
    host: str = "127.0.0.1"
    port: int = 50051
    """0 takes a free one."""
    tls_cert: Path | None = None
    """PEM file of the server's certificate and those between it and the authority; None: no TLS."""
    tls_key: Path | None = None
    tls_client_ca: Path | None = None
    """PEM file of the authorities whose certificates clients must show."""
    auth_tokens: Path | None = None
    """TOML file of the tokens that calls must carry; None: whoever reaches the port may do everything."""
    insecure: bool = False
    """Listen to other machines although nothing says who calls."""
    max_sessions: int = 256
    max_sessions_per_principal: int = 8
    """Of a caller whose token says nothing of it."""
    session_idle_seconds: int = 300
    """A session ends when neither a command nor an output has come for so long."""
    session_max_seconds: int = 3600
    """How long a session may last."""
    slow_reader_seconds: int = 60
    """How long a message of a stream may wait for its client before the call is ended."""
    log_format: str = "text"
    metrics_host: str = "127.0.0.1"
    metrics_port: int = 9464
    """0 takes a free one."""
    max_model_len: int | None = None
    """Prompt and generated tokens together; None: what the model was made for."""
    max_num_seqs: int = 64
    """Requests computed together."""
    edit_slots: int = 1024
    """Features that running requests may edit at a site, all together; a request that finds no room waits."""
    dtype: str = "auto"
    enforce_eager: bool = False
    """Run without torch.compile and CUDA graphs: slower, quicker to start."""
    kv_cache_gib: int = 4
    """Memory of the KV cache on CPU, in GiB, of each process; on CUDA it is what vLLM's share leaves."""
    gpu_memory_utilization: float | None = None
    """vLLM's share of a GPU's memory, model and KV cache; the rest is for dictionaries. None: vLLM's default, 0.92 in 0.32."""
    tensor_parallel_size: int = 1
    """Devices, or on CPU processes, that share each layer."""
    pipeline_parallel_size: int = 1
    """Groups of those that have the layers one after another."""
    drain_seconds: int = 30
    """How long running requests may go on after SIGTERM."""

    @property
    def local(self) -> bool:
        """Certainly no other machine reaches the gRPC port."""
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return self.host == "localhost"

    def to_toml(self) -> str:
        """The settings as a file that gives them again."""
        lists: dict[str, list[str]] = {
            "dictionaries": [str(source) for source in self.dictionaries],
            "sites": [str(site) for site in self.sites],
            "watch": [f"{dictionary}:{feature}" for dictionary, feature in self.watch],
        }
        values = {entry.name: getattr(self, entry.name) for entry in fields(self)} | lists
        # A TOML value of these kinds is written as in JSON.
        return "".join(
            f"{key} = {json.dumps(value, ensure_ascii=False, default=str)}\n"
            for key, value in values.items()
            if value is not None
        )


def resolve(flags: Mapping[str, Any], environ: Mapping[str, str] = os.environ) -> ServerConfig:
    """The settings that file, environment and flags amount to; InvalidConfig names a wrong key."""
    raw: dict[str, Any] = {}
    file = flags.get("config") or environ.get("STEER_CONFIG")
    if file:
        raw |= _read_toml(Path(file))
    raw |= _from_environment(environ)
    raw |= {key: flags[key] for key in _KEYS if key in flags}
    unknown = sorted(set(raw) - _KEYS)
    if unknown:
        raise InvalidConfig(
            f"no such setting; there are {', '.join(sorted(_KEYS))}", field=unknown[0]
        )
    if not raw.get("model"):
        raise InvalidConfig(
            "required: a Hugging Face folder or hub id, such as --model ./smollm2", field="model"
        )
    config = ServerConfig(**{key: _CHECKS[key](key, value) for key, value in raw.items()})
    _check_names(config)
    _check_reach(config)
    return config


def _check_reach(config: ServerConfig) -> None:
    """Who reaches the port may do everything, unless a token or a certificate says who calls."""
    known = config.auth_tokens or config.tls_client_ca
    if known or config.insecure or config.local:
        return
    raise InvalidConfig(
        f"{config.host} is reached from other machines, and nothing says who calls: set auth_tokens (and "
        "tls_cert and tls_key), or tls_client_ca; or insecure = true (--insecure), where the network keeps "
        "strangers out",
        field="host",
    )


def _check_names(config: ServerConfig) -> None:
    names = [source.name for source in config.dictionaries if source.name]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise InvalidConfig(f"{twice[0]!r} names two folders", field="dictionaries")
    if len(set(config.watch)) != len(config.watch):
        raise InvalidConfig("a feature is listed twice", field="watch")
    if len(config.watch) > MAX_WATCHED:
        raise InvalidConfig(
            f"{len(config.watch)} features; at most {MAX_WATCHED}, each is some ten series",
            field="watch",
        )


def _read_toml(file: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise InvalidConfig(f"{file} cannot be read: {error}", field="config") from error


def _from_environment(environ: Mapping[str, str]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key in _KEYS:
        value = environ.get(f"STEER_{key.upper()}")
        if value:
            found[key] = value.split(",") if key in _LISTS else value
    return found


def _integer(low: int, high: int):
    def check(key: str, value: Any) -> int:
        text = str(value)
        number = int(text) if re.fullmatch(r"[0-9]{1,9}", text) else -1
        if isinstance(value, bool) or not low <= number <= high:
            raise InvalidConfig(f"{value!r} is not a whole number in {low}..{high}", field=key)
        return number

    return check


def _share(key: str, value: Any) -> float:
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not 0 < number <= 1:
        raise InvalidConfig(f"{value!r} is not a number above 0 and up to 1", field=key)
    return number


def _boolean(key: str, value: Any) -> bool:
    known = {"true": True, "1": True, "false": False, "0": False}
    if str(value).lower() not in known:
        raise InvalidConfig(f"{value!r} is neither true nor false", field=key)
    return known[str(value).lower()]


def _text(key: str, value: Any) -> str:
    if not isinstance(value, str) or not value.strip():
        raise InvalidConfig(f"{value!r} is not a text", field=key)
    return value


def _file(key: str, value: Any) -> Path:
    return Path(_text(key, value))


def _one_of(known: Sequence[str]):
    def check(key: str, value: Any) -> str:
        if value not in known:
            raise InvalidConfig(f"{value!r} is not one of {', '.join(known)}", field=key)
        return value

    return check


def _sources(key: str, value: Any) -> tuple[DictionarySource, ...]:
    if isinstance(value, Mapping):
        return tuple(
            DictionarySource(Path(_text(key, folder)), name) for name, folder in value.items()
        )
    found = []
    for text in _list(key, value):
        name, equals, folder = text.rpartition("=")
        if not folder or (equals and not name):
            raise InvalidConfig(f"{text!r} is neither FOLDER nor NAME=FOLDER", field=key)
        found.append(DictionarySource(Path(folder), name))
    return tuple(found)


def _folder(key: str, value: Any) -> Path:
    folder = Path(_text(key, value))
    if not folder.is_dir():
        raise InvalidConfig(f"{value!r} is not a folder", field=key)
    return folder


def _sites(key: str, value: Any) -> tuple[Site, ...]:
    try:
        sites = tuple(Site.parse(text) for text in _list(key, value))
    except SteerError as error:
        raise InvalidConfig(str(error), field=key) from error
    inner = [str(site) for site in sites if site.inner]
    if inner:
        raise InvalidConfig(
            f"vLLM does not expose {', '.join(inner)}; served sites are {', '.join(SERVED)} of any layer",
            field=key,
        )
    return sites


def _watch(key: str, value: Any) -> tuple[tuple[str, int], ...]:
    found = []
    for text in _list(key, value):
        match = _WATCHED.fullmatch(text)
        if match is None:
            raise InvalidConfig(f"{text!r} is not DICTIONARY:FEATURE, such as l9:17", field=key)
        found.append((match[1], int(match[2])))
    return tuple(found)


def _list(key: str, value: Any) -> Sequence[str]:
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise InvalidConfig(f"{value!r} is not a list of texts", field=key)
    return value


_LISTS = {"dictionaries", "sites", "watch"}
_KEYS = {entry.name for entry in fields(ServerConfig)}
_CHECKS = {
    "model": _text,
    "dictionaries": _sources,
    "dictionary_root": _folder,
    "sites": _sites,
    "presets": _file,
    "watch": _watch,
    "host": _text,
    "port": _integer(0, 65535),
    "tls_cert": _file,
    "tls_key": _file,
    "tls_client_ca": _file,
    "auth_tokens": _file,
    "insecure": _boolean,
    "max_sessions": _integer(1, 1_000_000),
    "max_sessions_per_principal": _integer(1, 1_000_000),
    "session_idle_seconds": _integer(1, 86_400),
    "session_max_seconds": _integer(1, 10_000_000),
    "slow_reader_seconds": _integer(1, 86_400),
    "log_format": _one_of(LOG_FORMATS),
    "metrics_host": _text,
    "metrics_port": _integer(0, 65535),
    "max_model_len": _integer(2, 10_000_000),
    "max_num_seqs": _integer(1, 4096),
    "edit_slots": _integer(1, 1_000_000),
    "dtype": _one_of(DTYPES),
    "enforce_eager": _boolean,
    "kv_cache_gib": _integer(1, 100_000),
    "gpu_memory_utilization": _share,
    "tensor_parallel_size": _integer(1, 1024),
    "pipeline_parallel_size": _integer(1, 1024),
    "drain_seconds": _integer(0, 86_400),
}
