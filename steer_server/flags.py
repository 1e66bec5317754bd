"""The command line of `steer-server`."""

import argparse

from steer_server.api.auth import Scope
from steer_server.config import DTYPES, MAX_WATCHED
from steer_server.logs import LOG_FORMATS

_EXAMPLE = """\
example:
  steer-server --model ./smollm2 --dictionary ./dictionaries/smollm2-l9 \\
      --watch smollm2-l9:17 --max-model-len 1024

Every flag is also a key of the TOML file (max-model-len is max_model_len; dictionaries is a list of
folders or a table of name = folder) and an environment variable (STEER_MAX_MODEL_LEN; lists are
separated by commas). A flag beats the environment, which beats the file.

token file:
  `steer-server token alice --scope infer` prints a new token, and its entry for the TOML file of
  --auth-tokens: name, sha256 of the token, scopes (infer: generate under edits; observe: read
  activations; admin), and optionally max_calls, max_sessions, tokens_per_minute. The file is read
  anew when it changes.
"""


def parser() -> argparse.ArgumentParser:
    """The command line of `steer-server`."""
    root = argparse.ArgumentParser(
        prog="steer-server",
        description="Serve a language model whose features clients read and edit over gRPC.",
        epilog=_EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
    )
    root.add_argument("--config", metavar="FILE", help="TOML file with any of the keys below")
    root.add_argument(
        "--check-config",
        action="store_true",
        help="check settings, files and dictionaries, print the resulting settings, and exit",
    )
    model = root.add_argument_group("what is served")
    model.add_argument("--model", metavar="FOLDER|ID", help="Hugging Face folder or hub id")
    model.add_argument(
        "--dictionary",
        dest="dictionaries",
        action="append",
        metavar="[NAME=]FOLDER",
        help="load a dictionary; repeat for more (default name: the one its card has)",
    )
    model.add_argument(
        "--dictionary-root",
        metavar="FOLDER",
        help="dictionaries in it may be loaded while the server runs (default: none may)",
    )
    model.add_argument(
        "--site",
        dest="sites",
        action="append",
        metavar="SITE",
        help="serve this site, such as resid_post.12; repeat (default: those of the dictionaries)",
    )
    model.add_argument(
        "--presets", metavar="FILE", help="TOML file of named sets of edits that requests may use"
    )
    engine = root.add_argument_group("engine")
    engine.add_argument("--max-model-len", metavar="N", help="tokens of prompt and answer together")
    engine.add_argument(
        "--max-num-seqs", metavar="N", help="requests computed together (default 64)"
    )
    engine.add_argument(
        "--edit-slots",
        metavar="N",
        help="features that running requests may edit at a site, all together (default 1024)",
    )
    engine.add_argument("--dtype", metavar="|".join(DTYPES), help="of the model (default auto)")
    engine.add_argument(
        "--enforce-eager", action="store_true", help="no torch.compile, no CUDA graphs"
    )
    engine.add_argument("--kv-cache-gib", metavar="N", help="KV cache on CPU, in GiB (default 4)")
    engine.add_argument(
        "--gpu-memory-utilization",
        metavar="SHARE",
        help="of a GPU's memory, for model and KV cache; the rest is for dictionaries (default: vLLM's)",
    )
    engine.add_argument(
        "--tensor-parallel-size", metavar="N", help="devices that share each layer (default 1)"
    )
    engine.add_argument(
        "--pipeline-parallel-size",
        metavar="N",
        help="groups of devices that have the layers one after another (default 1)",
    )
    net = root.add_argument_group("network")
    net.add_argument("--host", help="gRPC address (default 127.0.0.1)")
    net.add_argument("--port", metavar="N", help="gRPC port (default 50051; 0: any free one)")
    net.add_argument(
        "--tls-cert", metavar="FILE", help="PEM certificate chain: calls come over TLS"
    )
    net.add_argument("--tls-key", metavar="FILE", help="its PEM key, without a passphrase")
    net.add_argument(
        "--tls-client-ca", metavar="FILE", help="clients must show a certificate that these sign"
    )
    net.add_argument(
        "--auth-tokens", metavar="FILE", help="calls must carry a token of this file (see below)"
    )
    net.add_argument(
        "--insecure",
        action="store_true",
        help="listen to other machines although nothing says who calls",
    )
    net.add_argument("--max-sessions", metavar="N", help="open at a time (default 256)")
    net.add_argument("--max-sessions-per-principal", metavar="N", help="of one token (default 8)")
    net.add_argument(
        "--session-idle-seconds", metavar="N", help="ends a session that does nothing (default 300)"
    )
    net.add_argument(
        "--session-max-seconds", metavar="N", help="how long a session may last (default 3600)"
    )
    net.add_argument(
        "--slow-reader-seconds",
        metavar="N",
        help="a call whose client takes nothing for so long is ended (default 60)",
    )
    net.add_argument("--log-format", metavar="|".join(LOG_FORMATS), help="of stderr (default text)")
    net.add_argument("--drain-seconds", metavar="N", help="grace after SIGTERM (default 30)")
    metrics = root.add_argument_group("metrics")
    metrics.add_argument("--metrics-host", metavar="HOST", help="default 127.0.0.1")
    metrics.add_argument("--metrics-port", metavar="N", help="default 9464; 0: any free one")
    metrics.add_argument(
        "--watch",
        action="append",
        metavar="DICT:FEATURE",
        help=f"export this feature's activations; repeat, at most {MAX_WATCHED}",
    )
    return root


def token_parser() -> argparse.ArgumentParser:
    """The command line of `steer-server token`."""
    root = argparse.ArgumentParser(
        prog="steer-server token",
        description="Make a token: it goes to stderr, once; its entry for --auth-tokens goes to stdout.",
        epilog="example: steer-server token alice --scope infer --scope observe >> tokens.toml",
    )
    root.add_argument("name", metavar="NAME", help="who will call with it")
    root.add_argument(
        "--scope",
        dest="scopes",
        action="append",
        type=Scope,
        choices=list(Scope),
        required=True,
        help="what it is good for; repeat for more",
    )
    return root
