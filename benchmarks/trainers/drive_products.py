"""The product that no step can do without, x W^T of the whole batch, and a large square one: what the machine can do.

By torch's own product, and by the one our trainer takes.
"""

import torch
from gate import Gate

from steer_server.dictionary.linear import linear
from trainer.allocator import keep_freed_memory

SQUARE = 2048


def main() -> None:
    gate = Gate()
    job = gate.job
    keep_freed_memory()
    kind, _, by = job["architecture"].partition(" ")
    if kind == "square":
        left, right = torch.rand(SQUARE, SQUARE), torch.rand(SQUARE, SQUARE)
    else:
        left = gate.x[: job["batch"]].clone()
        right = torch.rand((len(job["alphas"]) or 1) * job["n_features"], job["d_model"])
    gate.facts = {"flop": 2 * left.numel() * len(right)}
    product = linear if by else torch.nn.functional.linear
    while True:
        gate.wait()
        product(left, right)


if __name__ == "__main__":
    main()
