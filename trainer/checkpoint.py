"""What a training leaves on disk to go on from: one file, or one of each rank that has features of its own."""

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from trainer.errors import BadCheckpoint
from trainer.files import whole_file, write_json
from trainer.ranks import Ranks
from trainer.stack import REPLICATED, Stack

CHECKPOINT, PARTS = "checkpoint.safetensors", "checkpoint.json"


def save(groups: Sequence[Stack], step: int, folder: Path, ranks: Ranks) -> None:
    """Writes the checkpoint of all ranks, whole or not at all."""
    if not ranks.split_features:
        if ranks.first:
            _write(groups, step, folder / CHECKPOINT, ranks)
        ranks.meet()
        return
    # The parts before these are removed once the list names these: at no moment is there a mixture.
    names = [f"checkpoint-{step}-{rank}.safetensors" for rank in range(ranks.size)]
    own = folder / names[ranks.rank]
    _write(groups, step, own, ranks)
    ranks.meet()
    if ranks.first:
        write_json(folder / PARTS, {"ranks": ranks.size, "files": names})
    ranks.meet()
    for path in folder.glob(f"checkpoint-*-{ranks.rank}.safetensors"):
        if path != own:
            path.unlink()


def restore(groups: Sequence[Stack], folder: Path, ranks: Ranks) -> int:
    """Takes over the checkpoint, and returns its step; 0 without one. BadCheckpoint if it is not one of these stacks."""
    step = 0
    size, paths = _found(folder)
    if paths and size != ranks.size:
        raise BadCheckpoint(
            f"the checkpoint in {folder} is of {size} processes, these are {ranks.size}, whose sums would round "
            f"otherwise; start {size}, or remove it to begin anew"
        )
    if paths:
        path = paths[ranks.rank if ranks.split_features else 0]
        try:
            with safe_open(path, framework="pt") as file:
                step = json.loads(file.metadata()["state"])["step"]
                for number, group in enumerate(groups):
                    names = [n for n in file.keys() if n.startswith(f"{number}.")]  # noqa: SIM118
                    group.restore(
                        step, {n.removeprefix(f"{number}."): file.get_tensor(n) for n in names}
                    )
        except KeyError as error:
            raise BadCheckpoint(
                f"{path} lacks {error}, as those of another version do; remove it to begin anew"
            ) from error
        except Exception as error:
            raise BadCheckpoint(
                f"{path} cannot be read ({error}); remove it to begin anew"
            ) from error
    if not ranks.agree(step):
        raise BadCheckpoint(
            f"not all processes see the same checkpoint in {folder}; remove it to begin anew"
        )
    return step


def whole_parameters(
    groups: Sequence[Stack], folder: Path, ranks: Ranks
) -> list[dict[str, Tensor]]:
    """Of each group those of all features, from the last checkpoint if this rank has some of them only."""
    if not ranks.split_features:
        return [group.parameters for group in groups]
    _, paths = _found(folder)
    found: list[dict[str, Tensor]] = [{} for _ in groups]
    for number, group in enumerate(groups):
        for name in group.parameters:
            shares = []
            for path in paths[:1] if name in REPLICATED else paths:
                with safe_open(path, framework="pt") as file:
                    shares.append(file.get_tensor(f"{number}.p.{name}"))
            # Rank r has the features r, r + size, r + 2 size, ...
            found[number][name] = torch.stack(shares, dim=2).flatten(1, 2)
    return found


def _found(folder: Path) -> tuple[int, list[Path]]:
    """How many ranks wrote the checkpoint, and its files, by rank; none if there is none."""
    if (folder / PARTS).exists():
        try:
            content = json.loads((folder / PARTS).read_text(encoding="utf-8"))
            return content["ranks"], [folder / name for name in content["files"]]
        except (ValueError, KeyError) as error:
            raise BadCheckpoint(f"{folder / PARTS} is damaged ({error!r}); remove it") from error
    path = folder / CHECKPOINT
    if not path.exists():
        return 0, []
    try:
        with safe_open(path, framework="pt") as file:
            return json.loads(file.metadata()["state"])["ranks"], [path]
    except Exception as error:
        raise BadCheckpoint(f"{path} cannot be read ({error}); remove it to begin anew") from error


def _write(groups: Sequence[Stack], step: int, path: Path, ranks: Ranks) -> None:
    tensors = {
        f"{number}.{name}": value
        for number, group in enumerate(groups)
        for name, value in group.tensors().items()
    }
    # One key: safetensors writes several in any order, and equal checkpoints are to have equal bytes.
    state = json.dumps({"step": step, "ranks": ranks.size})
    with whole_file(path) as fresh:
        save_file(tensors, fresh, metadata={"state": state})
