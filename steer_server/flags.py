"""The command line of `steer-server`."""

import argparse

from steer_server.config import DTYPES, MAX_WATCHED

_EXAMPLE = """\
example:
  steer-server --model ./smollm2 --dictionary ./dictionaries/smollm2-l9 \\
      --watch smollm2-l9:17 --max-model-len 1024

Every flag is also a key of the TOML file (max-model-len is max_model_len; dictionaries is a list of
folders or a table of name = folder) and an environment variable (STEER_MAX_MODEL_LEN; lists are
separated by commas). A flag beats the environment, which beats the file.
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
        "--check-config", action="store_true", help="print the resulting settings and exit"
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
        "--site",
        dest="sites",
        action="append",
        metavar="SITE",
        help="serve this site, such as resid_post.12; repeat (default: those of the dictionaries)",
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
