"""The buffer: every row comes once an epoch, shuffled, in memory that stays where it is, and a resumption changes no byte."""

from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from steer_server.dictionary.files import load
from steer_server.dictionary.site import Site
from tests.unit.trainer_model import tiny_config, write_model
from trainer.buffer import Buffer, rounds
from trainer.checkpoint import CHECKPOINT
from trainer.cli import main
from trainer.config import TrainConfig
from trainer.errors import BadConfig, Interrupted, TrainerError
from trainer.harvest import Reader, harvest
from trainer.run import evaluate_again, harvest_only, run
from trainer.stop import Stop
from trainer.train import METRICS, train

pytestmark = pytest.mark.usefixtures("one_thread")

SITES = (Site.parse("resid_post.1"), Site.parse("mlp_act.2"))


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def config(model_folder: Path, tmp_path: Path) -> TrainConfig:
    """128 contexts of 31 rows, whose last group is full; 700 slots take a bit less than three groups."""
    return replace(tiny_config(model_folder, tmp_path), storage="buffer", buffer_rows=700)


def buffer(config: TrainConfig, folder: Path, stop: Stop | None = None) -> Buffer:
    stop = stop or Stop()
    return Buffer(config, Reader(config, SITES, folder, stop), folder, stop)


def epoch(source: Buffer, config: TrainConfig, step: int = 0) -> list[dict[Site, Tensor]]:
    """The batches of the first epoch from that step on."""
    steps = source.count // config.batch - step
    return [dict(batch) for batch in islice(source.batches(config, step), steps)]


def as_set(x: Tensor) -> set[tuple[float, ...]]:
    return set(map(tuple, x.tolist()))


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 300), st.integers(1, 120), st.integers(0, 5))
def test_every_row_is_drawn_once_from_the_slot_that_holds_it(
    rows: int, capacity: int, seed: int
) -> None:
    came: list[int] = []
    share = max(1, capacity // 2)
    entered: dict[int, int] = {}
    for number, (slots, held, drawn) in enumerate(
        rounds(rows, capacity, torch.Generator().manual_seed(seed))
    ):
        entered |= dict.fromkeys(held[slots].tolist(), number)
        assert len(drawn.unique()) == len(drawn)
        stays = [number - entered[row] for row in held[drawn].tolist()]
        assert max(stays) <= 5
        assert len(drawn) == share or len(came) + len(drawn) == rows
        came += held[drawn].tolist()

    assert sorted(came) == list(range(rows))


def test_an_epoch_is_every_activation_of_the_harvest_once_at_all_sites(
    config: TrainConfig, tmp_path: Path
) -> None:
    """With a batch that divides the number of rows none is left over."""
    config = replace(config, batch=62)
    on_disk = harvest(config, SITES, tmp_path / "shards", Stop())
    source = buffer(config, tmp_path / "buffer")
    batches = epoch(source, config)

    assert source.count == 128 * 31
    for site in SITES:
        x = torch.cat([batch[site] for batch in batches])
        expected = torch.cat(on_disk[site].shards)
        assert len(x) == len(expected)
        assert as_set(x) == as_set(expected)
        assert not torch.equal(x, expected)


def test_the_sites_of_a_batch_come_from_the_same_tokens(
    config: TrainConfig, tmp_path: Path
) -> None:
    on_disk = harvest(config, SITES, tmp_path / "shards", Stop())
    first, second = (torch.cat(on_disk[site].shards) for site in SITES)
    pairs = {tuple(one.tolist()): other for one, other in zip(first, second, strict=True)}

    batch = epoch(buffer(config, tmp_path / "buffer"), config)[7]

    for one, other in zip(batch[SITES[0]], batch[SITES[1]], strict=True):
        assert torch.equal(pairs[tuple(one.tolist())], other)


def test_a_batch_mixes_contexts_far_apart_and_epochs_differ(
    config: TrainConfig, tmp_path: Path
) -> None:
    on_disk = harvest(config, SITES, tmp_path / "shards", Stop())[SITES[0]]
    place = {
        tuple(x.tolist()): row // config.context
        for x, row in zip(torch.cat(on_disk.shards), torch.cat(on_disk.rows).tolist(), strict=True)
    }
    source = buffer(config, tmp_path / "buffer")
    per_epoch = source.count // config.batch
    both = list(islice(source.batches(config, 0), 2 * per_epoch))
    contexts = torch.tensor([[place[tuple(x.tolist())] for x in batch[SITES[0]]] for batch in both])

    # 64 rows of the 700 in the buffer, which come from 23 contexts and more; those of a harvest's order would be neighbours.
    assert min(len(some.unique()) for some in contexts) >= 12
    assert contexts.float().std(dim=1).median() > 25
    assert not torch.equal(both[0][SITES[0]], both[per_epoch][SITES[0]])


def test_statistics_and_examples_get_the_rows_of_the_harvest_with_their_places(
    config: TrainConfig, tmp_path: Path
) -> None:
    on_disk = harvest(config, SITES, tmp_path / "shards", Stop())
    source = buffer(config, tmp_path / "buffer")

    pieces, contexts = list(source.pieces()), list(source.contexts([3, 90]))

    for site in SITES:
        x, places = (torch.cat(parts) for parts in zip(*(p[site] for p in pieces), strict=True))
        assert torch.equal(x, torch.cat(on_disk[site].shards))
        assert torch.equal(places, torch.cat(on_disk[site].rows).long())
        for rows, expected in zip(contexts, on_disk[site].contexts([3, 90]), strict=True):
            assert all(map(torch.equal, rows[site], expected[site]))


@pytest.mark.parametrize("step", [1, 5, 6, 23, 60])
def test_batches_from_a_later_step_on_are_the_same_bits(
    config: TrainConfig, tmp_path: Path, step: int
) -> None:
    """350 rows a round are 5.5 batches: step 5 begins within a round, a batch of step 6 in two."""
    unbroken = epoch(buffer(config, tmp_path / "one"), config)
    resumed = epoch(buffer(config, tmp_path / "two"), config, step)

    assert len(resumed) == len(unbroken) - step
    for batch, expected in zip(resumed, unbroken[step:], strict=True):
        assert all(torch.equal(batch[site], expected[site]) for site in SITES)


def test_a_resumption_reads_the_contexts_of_the_buffer_and_no_more(
    config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = buffer(config, tmp_path / "buffer")
    read: list[int] = []
    original = Reader.read

    def counted(self: Reader, group: int):
        read.append(group)
        return original(self, group)

    monkeypatch.setattr(Reader, "read", counted)
    next(source.batches(config, 40))

    # 16 groups in all; a row stays five rounds at most, each of 350 rows, of 248 to a group.
    assert len(read) == len(set(read))
    assert 3 <= len(read) <= 10


def test_the_buffer_stays_where_it_is(config: TrainConfig, tmp_path: Path) -> None:
    source = buffer(config, tmp_path / "buffer")
    places: set[tuple[int, ...]] = set()
    for _ in islice(source.batches(config, 0), 2 * (source.count // config.batch)):
        places.add(tuple(x.data_ptr() for x in source._x.values()))
        assert [x.shape for x in source._x.values()] == [(700, 16), (700, 32)]

    assert len(places) == 1


def test_long_activations_are_left_out_of_their_sites_batches_only(
    config: TrainConfig, tmp_path: Path
) -> None:
    """A bound of the median leaves about half out."""
    config = replace(config, max_norm_ratio=1.0)
    source = buffer(config, tmp_path / "buffer")
    on_disk = harvest(config, SITES, tmp_path / "shards", Stop())
    batches = epoch(source, config)

    for site in SITES:
        x = torch.cat([batch[site] for batch in batches])
        kept = torch.cat(on_disk[site].shards)
        assert 0.3 < len(x) / source.count < 0.7
        assert x.norm(dim=1).max() <= source.max_norms[site]
        assert as_set(x) <= as_set(kept)
        assert len(kept) - len(x) < config.batch
    scales = source.scale_and_mean(True)
    for site in SITES:
        everything = torch.cat(on_disk[site].shards)
        torch.testing.assert_close(scales[site][1], everything.mean(dim=0), rtol=1e-4, atol=1e-5)
        square = everything.square().sum(dim=1).mean().item()
        assert scales[site][0] == pytest.approx((source.widths[site] / square) ** 0.5, rel=1e-4)


def test_a_bound_that_leaves_nothing_is_an_error(config: TrainConfig, tmp_path: Path) -> None:
    source = buffer(replace(config, max_norm_ratio=0.01), tmp_path / "buffer")

    with pytest.raises(TrainerError, match="set a larger max_norm_ratio"):
        next(source.batches(config, 0))


def test_training_from_a_buffer_broken_off_anywhere_ends_in_the_same_bytes(
    config: TrainConfig, tmp_path: Path
) -> None:
    configs = [
        replace(config, site=str(site), out=str(tmp_path / str(site)), alpha=alpha)
        for site, alpha in zip(SITES, (0.01, 0.02), strict=True)
    ]
    folder = tmp_path / "buffer"
    unbroken = train(configs, buffer(config, folder), tmp_path / "unbroken", Stop())

    for step in (1, 33, 62, 70):
        stop = Stop()

        def interrupt(now: int, stop: Stop = stop, step: int = step) -> None:
            stop.requested = now == step

        with pytest.raises(Interrupted, match=f"step {step} of"):
            train(configs, buffer(config, folder), tmp_path / "broken", stop, interrupt)
    resumed = train(configs, buffer(config, folder), tmp_path / "broken", Stop())

    assert [one.d_model for one in resumed] == [16, 32]
    for one, other in zip(resumed, unbroken, strict=True):
        assert torch.equal(one.W_dec, other.W_dec)
    for name in (CHECKPOINT, METRICS):
        assert (tmp_path / "broken" / name).read_bytes() == (
            tmp_path / "unbroken" / name
        ).read_bytes()


def test_a_stop_while_the_buffer_is_filled_saves_every_step_before(
    config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stop = Stop()
    source = buffer(config, tmp_path / "buffer", stop)
    configs = [replace(config, epochs=1)]
    original = Reader.read

    def read(self: Reader, group: int):
        stop.requested = len(steps) > 20
        return original(self, group)

    steps: list[int] = []
    monkeypatch.setattr(Reader, "read", read)
    with pytest.raises(Interrupted, match="every step before the buffer was filled is saved"):
        train(configs, source, tmp_path / "broken", Stop(), steps.append)
    resumed: list[int] = []
    stop.requested = False
    monkeypatch.setattr(Reader, "read", original)
    train(configs, source, tmp_path / "broken", Stop(), resumed.append)

    assert len(steps) > 20
    assert steps + resumed == list(range(1, 63))


def test_dictionaries_made_with_a_buffer_are_as_good_as_those_made_from_disk(
    config: TrainConfig, tmp_path: Path
) -> None:
    def configs(storage: str) -> Iterator[TrainConfig]:
        for site in map(str, SITES):
            out = str(tmp_path / storage / site)
            yield replace(config, storage=storage, site=site, out=out, epochs=4, n_features=48)  # type: ignore[arg-type]

    shards = run(list(configs("shards")), tmp_path / "runs", Stop())
    (shard_folder,) = (tmp_path / "runs").glob("activations-*")
    buffered = run(list(configs("buffer")), tmp_path / "other", Stop())

    assert list(shard_folder.glob("*/shard-*"))
    assert not list((tmp_path / "other").glob("**/shard-*"))
    for one, other in zip(buffered, shards, strict=True):
        assert one.quality is not None
        assert other.quality is not None
        assert one.quality.fvu == pytest.approx(other.quality.fvu, rel=0.1)
        assert one.quality.l0 == pytest.approx(other.quality.l0, rel=0.1)
        assert one.quality.fvu < 0.9
        assert one.training["tokens"] == other.training["tokens"]
    for made in configs("buffer"):
        stored = load(Path(made.out))
        assert stored.card.quality == evaluate_again(Path(made.out), None, [], None, Stop())
        feature, entry = max(
            stored.evidence.items(), key=lambda item: stored.statistics.max[item[0]]
        )
        peak = max(entry.examples[0].activations)
        assert peak == pytest.approx(stored.statistics.max[feature].item(), rel=0.05)


def test_pca_is_the_same_from_a_buffer_and_from_disk(config: TrainConfig, tmp_path: Path) -> None:
    pca = replace(config, architecture="pca", alpha=0.0, n_features=8)
    made = [
        run([replace(pca, storage=storage, out=str(tmp_path / storage))], tmp_path / "runs", Stop())
        for storage in ("shards", "buffer")
    ]

    assert made[0][0].sha256 == made[1][0].sha256


def test_a_buffer_that_does_not_fit_is_refused(config: TrainConfig, tmp_path: Path) -> None:
    source = buffer(replace(config, buffer_rows=10**6), tmp_path / "buffer")
    source._capacity = 2**44

    with pytest.raises(BadConfig, match=r"a buffer of .* rows at .* set a smaller buffer_rows"):
        next(source.batches(config, 0))


def test_a_harvest_for_a_buffer_is_refused(config: TrainConfig, tmp_path: Path) -> None:
    with pytest.raises(BadConfig, match="storage is 'buffer', which leaves no activations on disk"):
        harvest_only([config], tmp_path, Stop(), lambda *_: None)


def test_help_says_what_a_buffer_costs(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["train", "--help"])

    assert 'storage = "buffer"' in capsys.readouterr().out
