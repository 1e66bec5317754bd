"""What plain `vllm serve` does with the fields that carry edits. The plugin's own behaviour belongs here too."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.helpers import IOI
from tests.e2e.serve import Server, serving

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def server(model_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serving(model_path, tmp_path_factory.mktemp("serve") / "log") as server:
        print(f"vllm serve answered after {server.start_seconds:.1f} s")
        yield server


def test_a_completion_over_http_names_mary(server: Server) -> None:
    status, answer = server.complete(IOI)

    assert status == 200
    assert answer["choices"][0]["text"].startswith(" Mary")
    assert answer["kv_transfer_params"] is None


def test_xargs_take_text_and_numbers_but_no_objects(server: Server) -> None:
    status, answer = server.complete(IOI, vllm_xargs={"other": {"edits": []}})

    assert status == 400
    assert "vllm_xargs" in str(answer)
    assert server.complete(IOI, vllm_xargs={"other": '{"edits": []}'})[0] == 200
