"""What `--help` of the trainer's commands says."""

from pathlib import Path

ABOUT = """Sparse dictionaries of a language model's activations, from text to a folder to serve.

    python -m trainer model --out models/SmolLM2-135M-Instruct
    python -m trainer corpus --out corpora
    python -m trainer harvest examples/smollm2-135m.toml
    python -m trainer train examples/smollm2-135m.toml

`train` harvests by itself what is not there yet; `harvest` is for doing it before, or on another machine. Every command can be broken off with Ctrl-C and started again; it goes on where it was.
"""

TRAIN = """Harvests activations, trains a dictionary, measures it on held-out text, finds each feature's
examples and logit effects, and writes the folder `out`. `preset = "paper"` trains arXiv 2309.08600 to the letter.

A list in the place of site, architecture, n_features, k, alpha, lr or seed asks for a dictionary of each;
all of them train in one pass over the activations, and `out` becomes the folder that holds them:

    python -m trainer train examples/smollm2-135m.toml --set 'alpha=[1e-3, 2e-3, 4e-3]' --set out=runs/alphas

The streams attn_z and mlp_act are what goes into the last projection of attention and MLP: the heads' outputs side
by side, and the hidden activations, where the paper trained its MLP dictionaries. Dictionaries there are evaluated
and interpreted like all others, but not served: vLLM does not expose these tensors.

Activations take width x 2 bytes of disk for each token and site. With storage = "buffer" they take none: the model
fills a buffer in memory (buffer_rows x width x 2 bytes for each site, on the GPU if there is one), half of which is
drawn at random and filled again at a time, and the dictionaries of all sites train in one pass. The model then runs once
per epoch, twice more for the statistics and examples of all dictionaries together, once for each pca, and to go on
after a stop for what was in the buffer, at most some three buffers' worth. For several epochs or one more sweep over
the same activations shards are cheaper; for more tokens than the disk holds there is the buffer.

Ctrl-C or SIGTERM: the step in progress is finished, a checkpoint written, exit code 130. The same
command goes on from there and ends in the same bytes as if it had not been broken off. Harvests
are shared by all runs with the same model, site, corpus and context.

Several processes, on GPUs or CPU cores, of one machine or of several that share the --runs folder:

    torchrun --standalone --nproc-per-node=8 -m trainer train CONFIG
    torchrun --nnodes=2 --nproc-per-node=8 --rdzv-backend=c10d --rdzv-endpoint=HOST:29500 -m trainer train CONFIG

The harvest is divided among them, and of the training what the key `parallel` says: data, each batch (the
default); features, for dictionaries too wide for one device; members, the dictionaries of a sweep, which
need nothing of each other. The result differs from one process's by rounding, and with as many processes
is the same each time, broken off or not. A signal to torchrun stops them all, at the same step where they
share one; raise its --shutdown-timeout, 30 s, if a step and a checkpoint take longer. With --max-restarts=3
it starts them again after one has died, from the last checkpoint.

Too many active features: raise alpha. FVU too high, or many dead features: lower it.
"""

HARVEST = """Runs the model over the corpus and keeps what it computes at the sites of the configuration, in the folder
RUNS/activations-..., whose name stands for the settings that the activations depend on:

    python -m trainer harvest examples/smollm2-135m.toml --set 'site=["resid_post.10", "mlp_out.10"]'

`train` with the same --runs finds them there, whatever it is told of architecture, n_features, k, alpha, seed, batch or
epochs. Sites that come later are added in a pass of their own. What is harvested, and from what:

    model, site          every layer after the last site is left out
    corpus, tokens       documents joined by the end-of-sequence token and cut into contexts of `context` tokens
    skip_positions       the first positions of a context are left out, as attention sinks
    max_norm_ratio       so are activations longer than this many medians
    activation_dtype     2 bytes a number, or 4: a token takes width x 2 bytes at each site

One million tokens of a model of width 576 are 1.2 GB at a site. The file tokens.safetensors beside the sites holds the
contexts, held-out ones included; shards of 64 contexts follow, each written whole. Ctrl-C or SIGTERM: the shard in progress
is lost, exit code 130, and the same command goes on with it. The folder can be moved and copied, and removed when
the dictionaries are made: `evaluate`, `compare` and `label` do not need it.
"""

COMPARE = """Prints a table of their quality as it was measured on held-out text, and for each two of the same site:

    MMCS      mean over the first's features of the largest cosine with any of the second's decoder rows
    matched   mean cosine when each feature may be matched once (Hungarian method)
    shared    share of matched pairs with a cosine above 0.9, the paper's threshold
"""


PROBE = """Fits a logistic regression on the k features that tell a class of words best, and measures it on documents that no
dictionary was trained on. The classes are those of a corpus with `words`, `tags` and `starts` beside `text`, such as
corpora/brown.jsonl: the first two letters of a part-of-speech tag, NN for all of nn, nns, nn$. A word's tag is on the
token that ends the word; tokens that end several words and tokens without a tag are left out. Each class is told from
all other tagged tokens, with the threshold that has the best F1 on the training tokens.

    coordinates           the same with the k best coordinates of the stream itself
    all coordinates       a logistic regression on the whole vector
    difference of means   the direction from the mean of all others to the class's
"""

SOURCES = """Both run the model on the same tokens of the configuration's corpus, and what differs is printed for each site:
|x' - x| / |x| on the rows that a dictionary would be trained on, and how many of a token's strongest features of a
given dictionary are the same. vLLM is started three times: in float32, in float32 with contexts computed in chunks, and
in bfloat16. A dictionary is trained on what vLLM serves with

    source = "vllm", and served_dtype as in `steer-server --dtype`
"""


def fields() -> str:
    """The configuration's keys with their docstrings."""
    import json
    import textwrap

    from trainer.config import PRESETS

    paper = ", ".join(f"{key} = {json.dumps(value)}" for key, value in PRESETS["paper"].items())
    about = f"What a key is that the file does not name: as below, or of arXiv 2309.08600, {paper}"
    lines = [
        "keys of the configuration:",
        '  preset = "modern"',
        textwrap.fill(about, 110, initial_indent=" " * 6, subsequent_indent=" " * 6),
        *docstrings(Path(__file__).parent / "config.py", "TrainConfig"),
    ]
    return "\n".join(lines).replace("%", "%%")


def docstrings(path: Path, name: str) -> list[str]:
    """The fields of a dataclass with their docstrings, which only the source has."""
    import ast
    from itertools import pairwise

    source = path.read_text(encoding="utf-8")
    (body,) = (
        node.body
        for node in ast.parse(source).body
        if isinstance(node, ast.ClassDef) and node.name == name
    )
    lines = []
    for field, text in pairwise(body):
        if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr):
            default = f" = {ast.unparse(field.value)}" if field.value else ""
            default = "" if default.startswith(" = field(") else default
            assert isinstance(text.value, ast.Constant)
            lines.append(f"  {ast.unparse(field.target)}{default}\n      {text.value.value}")
    return lines
