"""The product that no step can do without, x W^T of the whole batch, and a large square one: what the machine can do."""

import torch
from gate import Gate

SQUARE = 2048


def main() -> None:
    gate = Gate()
    job = gate.job
    members, batch, d_model, n_features = (
        len(job["alphas"]) or 1,
        job["batch"],
        job["d_model"],
        job["n_features"],
    )
    if job["architecture"] == "square":
        left, right, out = (torch.rand(SQUARE, SQUARE) for _ in range(3))
        gate.facts = {"flop": 2 * SQUARE**3}
    else:
        left, right = gate.x[:batch].clone(), torch.rand(members * n_features, d_model).T
        out = torch.empty(batch, members * n_features)
        gate.facts = {"flop": 2 * batch * d_model * n_features * members}
    while True:
        gate.wait()
        torch.mm(left, right, out=out)


if __name__ == "__main__":
    main()
