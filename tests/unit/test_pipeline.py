"""How results are packed between pipeline stages; tests/e2e/test_parallel.py sends them."""

import pytest
import torch

from steer_server.vllm_plugin.pipeline import pack, unpack


@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
@pytest.mark.parametrize("length", range(16))
def test_results_survive_packing_and_no_number_of_ranks_divides_them(
    ranks: int, length: int
) -> None:
    results = [{"request": [b"x" * length, 1.5, None]}]

    packed = pack(results, ranks)

    assert packed.dtype == torch.uint8
    assert unpack(packed) == results
    assert ranks == 1 or packed.numel() % ranks != 0
