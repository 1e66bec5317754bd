"""The trainer end to end on a tiny random Llama: loss, resumption, harvest, artefact."""

import json
import math
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from steer_server.dictionary.files import load
from steer_server.dictionary.site import Site
from steer_server.errors import DictionaryMismatch
from tests.unit.trainer_model import tiny_config, write_model
from trainer.architectures import ARCHITECTURES
from trainer.checkpoint import CHECKPOINT
from trainer.cli import main
from trainer.config import TrainConfig
from trainer.errors import BadCheckpoint, BadConfig, Interrupted, TrainerError
from trainer.harvest import Activations, harvest
from trainer.model import decoder_layers, load_model, load_tokenizer, read_sites, truncate
from trainer.run import evaluate_again, label, run
from trainer.stop import Stop
from trainer.tokens import pack
from trainer.top_k import TopK
from trainer.train import METRICS, train

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def config(model_folder: Path, tmp_path: Path) -> TrainConfig:
    return tiny_config(model_folder, tmp_path)


def harvested(config: TrainConfig, folder: Path, stop: Stop) -> Activations:
    """Of the one site of the configuration."""
    (activations,) = harvest(config, [Site.parse(config.site)], folder, stop).values()
    return activations


def sweep(config: TrainConfig) -> list[TrainConfig]:
    """Two dictionaries of each architecture; features die soon, so that AuxK has work."""
    found = []
    for number, name in enumerate(ARCHITECTURES):
        by_k = isinstance(ARCHITECTURES[name], TopK)
        for member in range(2):
            sparsity = {"k": 1 + member} if by_k else {"alpha": 0.01 * (member + 1)}
            out = f"{config.out}-{number}-{member}"
            change = {"warmup": 10, "decay": 0.2, "clip": 1.0, "dead_after": config.batch}
            chosen = {"architecture": name, "out": out, "seed": member, "k": 0, "alpha": 0.0}
            found.append(replace(config, **change, **(chosen | sparsity)))
    return found


def test_training_broken_off_twice_ends_in_the_same_bytes(
    config: TrainConfig, tmp_path: Path
) -> None:
    configs = sweep(config)
    activations = harvested(config, tmp_path / "activations", Stop())
    unbroken = train(configs, activations, tmp_path / "unbroken", Stop())

    for step in (1, 70):
        stop = Stop()

        def interrupt(now: int, stop: Stop = stop, step: int = step) -> None:
            stop.requested = now == step

        with pytest.raises(Interrupted, match=f"step {step} of"):
            train(configs, activations, tmp_path / "broken", stop, interrupt)
    resumed = train(configs, activations, tmp_path / "broken", Stop())

    for one, other in zip(resumed, unbroken, strict=True):
        assert torch.equal(one.W_dec, other.W_dec)
        assert torch.equal(one.b_enc, other.b_enc)
    assert (tmp_path / "broken" / CHECKPOINT).read_bytes() == (
        tmp_path / "unbroken" / CHECKPOINT
    ).read_bytes()
    assert (tmp_path / "broken" / METRICS).read_text() == (
        tmp_path / "unbroken" / METRICS
    ).read_text()
    lines = [json.loads(line) for line in (tmp_path / "broken" / METRICS).open()]
    with_dead = {line["out"] for line in lines if line["step"] > 70 and line["dead_share"] > 0}
    assert with_dead >= {own.out for own in configs if own.k == 1}, "AuxK had no work"


def test_metrics_written_after_the_checkpoint_are_not_written_twice(
    config: TrainConfig, tmp_path: Path
) -> None:
    activations = harvested(config, tmp_path / "activations", Stop())
    train([config], activations, tmp_path / "training", Stop())
    (tmp_path / "training" / CHECKPOINT).unlink()
    with (tmp_path / "training" / METRICS).open("a") as file:
        file.write('{"step": 1')

    train([config], activations, tmp_path / "training", Stop())

    lines = (tmp_path / "training" / METRICS).read_text().splitlines()
    steps = [json.loads(line)["step"] for line in lines]
    assert steps == sorted(set(steps))


def test_training_lowers_the_loss_and_keeps_rows_of_unit_norm(
    config: TrainConfig, tmp_path: Path
) -> None:
    activations = harvested(config, tmp_path / "activations", Stop())
    (dictionary,) = train([replace(config, epochs=6)], activations, tmp_path / "training", Stop())

    x = activations.gather(torch.arange(500))
    error = (dictionary.decode(dictionary.encode(x)) - x).square().sum()
    assert error / (x - x.mean(dim=0)).square().sum() < 0.6
    torch.testing.assert_close(dictionary.W_dec.norm(dim=1), torch.ones(24))
    scaled = x * dictionary.input_scale
    assert scaled.square().sum(dim=1).mean().item() == pytest.approx(16, rel=0.1)


def test_a_harvest_broken_off_goes_on_at_the_next_shard(
    config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trainer.harvest.SHARD_CONTEXTS", 16)
    whole = harvested(config, tmp_path / "whole", Stop())

    class StopAtThirdShard(Stop):
        def check(self, done: str) -> None:
            self.requested = "shard-00002" in done
            super().check(done)

    with pytest.raises(Interrupted, match="shard-00002"):
        harvested(config, tmp_path / "broken", StopAtThirdShard())
    left = sorted(path.name for path in (tmp_path / "broken").glob("*/shard-*"))
    resumed = harvested(config, tmp_path / "broken", Stop())

    assert left == ["shard-00000.safetensors", "shard-00001.safetensors"]
    assert len(resumed.shards) > 2
    assert all(map(torch.equal, resumed.shards, whole.shards))


def test_no_row_of_position_0_is_harvested_and_each_row_knows_its_place(
    config: TrainConfig, tmp_path: Path
) -> None:
    activations = harvested(config, tmp_path / "activations", Stop())

    row = activations.rows[0][40].item()
    context, position = divmod(row, config.context)
    model = load_model(config.model)
    (x,) = read_sites(model, [Site.parse(config.site)], activations.train[context : context + 1])
    assert not (torch.cat(activations.rows) % config.context == 0).any()
    torch.testing.assert_close(activations.shards[0][40], x[0, position], rtol=1e-5, atol=1e-6)


def test_without_a_norm_ratio_and_skipped_positions_every_activation_is_harvested_and_measured(
    config: TrainConfig, tmp_path: Path
) -> None:
    every = replace(config, max_norm_ratio=0.0, skip_positions=0, epochs=1)

    (card,) = run([every], tmp_path / "runs", Stop())

    activations = harvested(
        every, tmp_path / "runs" / f"activations-{every.harvest_digest}", Stop()
    )
    assert activations.count == activations.train.numel()
    assert card.quality is not None
    assert card.quality.tokens == activations.heldout.numel()


def test_the_seed_of_the_weights_does_not_choose_the_documents(config: TrainConfig) -> None:
    tokenizer = load_tokenizer(config.model)
    first = pack(config, tokenizer, Stop())

    other_weights = pack(replace(config, seed=1), tokenizer, Stop())
    other_data = pack(replace(config, data_seed=1), tokenizer, Stop())

    assert torch.equal(first["train"], other_weights["train"])
    assert not torch.equal(first["train"], other_data["train"])


def test_gather_reads_rows_of_any_shard_in_the_order_asked(
    config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trainer.harvest.SHARD_CONTEXTS", 16)
    activations = harvested(config, tmp_path / "activations", Stop())
    index = torch.randperm(activations.count)[:300]

    assert torch.equal(activations.gather(index), torch.cat(activations.shards)[index])


@pytest.mark.parametrize("site", ["resid_post.2", "mlp_out.2", "attn_out.2"])
def test_the_truncated_model_gives_the_full_models_activations(
    model_folder: Path, site: str
) -> None:
    tokens = torch.arange(2, 18).view(2, 8)
    full = load_model(str(model_folder))
    (expected,) = read_sites(full, [Site.parse(site)], tokens)
    hidden = full(input_ids=tokens, output_hidden_states=True).hidden_states

    cut = truncate(load_model(str(model_folder)), [Site.parse(site)])

    assert len(decoder_layers(cut)) == 3
    assert not any("lm_head" in name for name, _ in cut.named_parameters())
    torch.testing.assert_close(read_sites(cut, [Site.parse(site)], tokens), [expected])
    assert torch.equal(expected, hidden[3]) == (site == "resid_post.2")


def test_a_site_beyond_the_last_layer_is_refused(model_folder: Path) -> None:
    with pytest.raises(BadConfig, match=r"layers 0\.\.3"):
        truncate(load_model(str(model_folder)), [Site.parse("resid_post.4")])


def test_an_activation_that_overflows_its_dtype_stops_the_harvest(
    config: TrainConfig, tmp_path: Path, model_folder: Path
) -> None:
    model = LlamaForCausalLM.from_pretrained(model_folder)
    model.model.embed_tokens.weight.data *= 1e6
    model.save_pretrained(tmp_path / "loud")
    load_tokenizer = PreTrainedTokenizerFast.from_pretrained(model_folder)
    load_tokenizer.save_pretrained(tmp_path / "loud")
    loud = replace(config, model=str(tmp_path / "loud"), activation_dtype="float16")

    with pytest.raises(TrainerError, match="overflows float16; set activation_dtype"):
        harvested(loud, tmp_path / "activations", Stop())


def test_a_damaged_checkpoint_is_named_and_not_overwritten(
    config: TrainConfig, tmp_path: Path
) -> None:
    activations = harvested(config, tmp_path / "activations", Stop())
    (tmp_path / "training").mkdir()
    (tmp_path / "training" / CHECKPOINT).write_bytes(b"not a checkpoint")

    with pytest.raises(BadCheckpoint, match="remove it to begin anew"):
        train([config], activations, tmp_path / "training", Stop())
    assert (tmp_path / "training" / CHECKPOINT).read_bytes() == b"not a checkpoint"


def test_a_checkpoint_of_another_version_is_named_with_what_it_lacks(
    config: TrainConfig, tmp_path: Path
) -> None:
    activations = harvested(config, tmp_path / "activations", Stop())
    train([config], activations, tmp_path / "training", Stop())
    path = tmp_path / "training" / CHECKPOINT
    with safe_open(path, framework="pt") as file:
        state, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    del tensors["0.guess"]
    save_file(tensors, path, state)

    with pytest.raises(BadCheckpoint, match=r"lacks 'guess'.* remove it to begin anew"):
        train([config], activations, tmp_path / "training", Stop())


def test_a_run_leaves_a_dictionary_whose_card_tells_how_it_was_made(
    config: TrainConfig, tmp_path: Path
) -> None:
    (card,) = run([config], tmp_path / "runs", Stop())

    stored = load(Path(config.out), json.loads((Path(config.model) / "config.json").read_text()))
    assert stored.card == card
    assert card.training["config"]["alpha"] == config.alpha
    assert card.training["separator"] == "<eos>"
    assert card.quality == evaluate_again(Path(config.out), None, [], None, Stop())
    assert run([config], tmp_path / "runs", Stop()) == [card]
    with pytest.raises(BadConfig, match="another configuration"):
        run([replace(config, alpha=0.5)], tmp_path / "runs", Stop())


def test_other_corpora_are_held_out_whole_and_its_own_are_not(
    config: TrainConfig, tmp_path: Path
) -> None:
    run([config], tmp_path / "runs", Stop())
    own = next(iter(config.corpus))
    (tmp_path / "other.txt").write_text("the cat sat on the mat " * 40)

    other = evaluate_again(Path(config.out), None, [str(tmp_path / "other.txt")], 64, Stop())
    again = evaluate_again(Path(config.out), None, [own], None, Stop())

    assert other.tokens == 2 * (config.context - 1)
    assert again == load(Path(config.out)).card.quality


def test_examples_show_the_activations_of_their_tokens_strongest_first(
    config: TrainConfig, tmp_path: Path
) -> None:
    run([config], tmp_path / "runs", Stop())

    stored = load(Path(config.out))
    feature, entry = max(stored.evidence.items(), key=lambda item: stored.statistics.max[item[0]])
    peaks = [max(example.activations) for example in entry.examples]
    assert peaks == sorted(peaks, reverse=True)
    assert peaks[0] == pytest.approx(stored.statistics.max[feature].item(), rel=0.05)
    assert all(len(example.tokens) == len(example.activations) for example in entry.examples)
    assert len(entry.logits_up) == 3
    assert entry.logits_up[0][1] > 0 > entry.logits_down[0][1]


def test_labels_are_merged_and_the_weights_keep_their_identity(
    config: TrainConfig, tmp_path: Path
) -> None:
    (card,) = run([config], tmp_path / "runs", Stop())
    before = load(Path(config.out))
    labels = tmp_path / "labels.toml"
    labels.write_text(f'weights_sha256 = "{card.sha256}"\n[labels]\n3 = "cats"\n')

    assert label(Path(config.out), labels) == 1

    after = load(Path(config.out))
    assert after.sha256 == before.sha256
    assert after.evidence[3].label == "cats"
    assert after.evidence[3].examples == before.evidence[3].examples
    assert after.card.quality == before.card.quality


def test_labels_of_another_dictionary_are_refused(config: TrainConfig, tmp_path: Path) -> None:
    run([config], tmp_path / "runs", Stop())
    labels = tmp_path / "labels.toml"
    labels.write_text('weights_sha256 = "00"\n[labels]\n3 = "cats"\n')

    with pytest.raises(BadConfig, match="means nothing in another dictionary"):
        label(Path(config.out), labels)


def test_a_signal_ends_the_command_with_130_and_a_way_to_go_on(
    config: TrainConfig, tmp_path: Path
) -> None:
    lines = [f"{key} = {json.dumps(getattr(config, key))}" for key in ("model", "site", "out")]
    lines += ["tokens = 4096", "eval_tokens = 256", "n_features = 24", "k = 4"]
    lines += ["batch = 64", "epochs = 100000", "context = 32", "threads = 1"]
    lines += ["[corpus]", f"{json.dumps(next(iter(config.corpus)))} = 1.0"]
    (tmp_path / "c.toml").write_text("\n".join(lines))
    command = [sys.executable, "-m", "trainer", "train", str(tmp_path / "c.toml")]
    process = subprocess.Popen(
        [*command, "--runs", str(tmp_path / "runs")],
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
    )
    assert process.stderr is not None
    seen = ""
    while "train:" not in seen:
        seen += process.stderr.read(1)
    process.send_signal(signal.SIGTERM)
    _, rest = process.communicate(timeout=60)

    assert process.returncode == 130
    assert "The same command goes on from there." in rest
    assert list((tmp_path / "runs").glob("training-*/" + CHECKPOINT))


def write_toml(config: TrainConfig, path: Path) -> Path:
    """A batch_top_k dictionary at two sites."""
    lines = [f"{key} = {json.dumps(getattr(config, key))}" for key in ("model", "out", "context")]
    lines += ['site = ["resid_post.1", "mlp_act.1"]', "tokens = 4096", "eval_tokens = 256"]
    lines += ["n_features = 24", "k = 4", "batch = 64", "threads = 1", "holdout_every = 10"]
    lines += ["[corpus]", f"{json.dumps(next(iter(config.corpus)))} = 1.0"]
    path.write_text("\n".join(lines))
    return path


def test_a_harvest_made_by_its_own_command_is_what_training_takes(
    config: TrainConfig,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    toml = write_toml(config, tmp_path / "c.toml")
    command = [str(toml), "--runs", str(tmp_path / "runs")]

    assert main(["harvest", *command]) == 0
    first, *sites = capsys.readouterr().out.splitlines()
    assert main(["harvest", *command]) == 0
    again = capsys.readouterr().out.splitlines()[0]
    monkeypatch.setattr("trainer.harvest.read_sites", pytest.fail)
    assert main(["train", *command]) == 0

    (folder,) = (tmp_path / "runs").glob("activations-*")
    assert first.startswith(f"{folder}: 4,096 tokens in ")
    assert first.endswith(" tokens/s")
    assert [line.split()[0] for line in sites] == ["mlp_act.1", "resid_post.1"]
    assert "activations of width 32, float16" in sites[0]
    assert again == f"{folder}: complete, nothing to do"
    assert len(list(Path(config.out).glob("*/dictionary.json"))) == 2


def test_a_harvest_says_what_it_read_when_progress_bars_are_off(
    config: TrainConfig, tmp_path: Path
) -> None:
    toml = write_toml(config, tmp_path / "c.toml")
    command = [sys.executable, "-m", "trainer", "harvest", str(toml), "--runs", str(tmp_path)]

    # tqdm reads this once, when it is imported.
    done = subprocess.run(
        command, env=os.environ | {"TQDM_DISABLE": "1"}, capture_output=True, text=True, check=False
    )

    assert done.returncode == 0, done.stderr
    assert ": 4,096 tokens in " in done.stdout
    assert "harvest resid_post.1" not in done.stderr


def test_a_harvest_broken_off_by_a_signal_says_so_and_goes_on(
    config: TrainConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    toml = write_toml(config, tmp_path / "c.toml")

    signals = iter([signal.SIGINT])

    def interrupted(model, sites, contexts):
        for number in signals:
            os.kill(os.getpid(), number)
        return read_sites(model, sites, contexts)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("trainer.harvest.read_sites", interrupted)
        code = main(["harvest", str(toml), "--runs", str(tmp_path / "runs")])
    said = capsys.readouterr().err
    whole = main(["harvest", str(toml), "--runs", str(tmp_path / "runs")])

    assert code == 130
    assert "the harvest has every shard before shard-00000.safetensors" in said
    assert whole == 0
    assert capsys.readouterr().out.count(" GB; ") == 2


def test_a_configuration_error_is_one_line_and_exit_code_1(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "c.toml").write_text("speed = 3\n")

    assert main(["train", str(tmp_path / "c.toml")]) == 1
    assert capsys.readouterr().err.startswith("error: unknown keys: speed; known are model, site")


def test_dictionaries_of_one_pass_are_what_each_is_alone(
    config: TrainConfig, tmp_path: Path
) -> None:
    """Up to the rounding of products that are made for several at once."""
    configs = sweep(config)
    activations = harvested(config, tmp_path / "activations", Stop())
    together = train(configs, activations, tmp_path / "together", Stop())

    for number, one in enumerate(configs):
        (alone,) = train([one], activations, tmp_path / f"alone{number}", Stop())
        torch.testing.assert_close(together[number].W_dec, alone.W_dec, rtol=1e-3, atol=1e-3)
        assert together[number].activation == alone.activation


def test_a_sweep_is_one_command_and_a_folder_of_dictionaries(
    config: TrainConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cards = run(sweep(config), tmp_path / "runs", Stop())

    # What the model does without a dictionary is computed once for every four.
    evaluations = capsys.readouterr().err.count("evaluate:   0%")
    assert evaluations == math.ceil(len(cards) / 4)
    assert [card.architecture for card in cards] == [c.architecture for c in sweep(config)]
    for card, one in zip(cards, sweep(config), strict=True):
        assert card.quality is not None
        assert card.quality.fvu < 1
        assert load(Path(one.out)).card == card
    lines = (next(iter((tmp_path / "runs").glob("training-*"))) / METRICS).read_text().splitlines()
    assert {json.loads(line)["out"] for line in lines} == {one.out for one in sweep(config)}


def test_activations_that_are_no_numbers_stop_the_training(
    config: TrainConfig, tmp_path: Path
) -> None:
    activations = harvested(config, tmp_path / "activations", Stop())
    activations.shards[0][3, 2] = torch.nan

    with pytest.raises(TrainerError, match="not finite; remove the harvest"):
        train([config], activations, tmp_path / "training", Stop())


def test_sites_are_harvested_in_one_pass_and_those_that_come_later_are_added(
    config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sites = [Site.parse(text) for text in ("resid_post.1", "mlp_out.2", "attn_out.0")]
    passes: list[int] = []

    def counted(model, sites, contexts):
        passes.append(len(sites))
        return read_sites(model, sites, contexts)

    monkeypatch.setattr("trainer.harvest.read_sites", counted)
    whole = harvest(config, sites, tmp_path / "whole", Stop())
    together = len(passes)
    harvest(config, sites[:1], tmp_path / "parts", Stop())
    passes.clear()
    parts = harvest(config, sites, tmp_path / "parts", Stop())

    assert len(passes) == together
    assert set(passes) == {2}
    for site in sites:
        assert all(map(torch.equal, whole[site].shards, parts[site].shards)), site
    assert whole[sites[0]].count > 0


def test_a_sweep_over_sites_trains_each_sites_dictionaries_on_its_own_activations(
    config: TrainConfig, tmp_path: Path
) -> None:
    configs = [
        replace(config, site=site, out=str(tmp_path / site), epochs=1)
        for site in ("resid_post.1", "mlp_out.2")
    ]

    cards = run(configs, tmp_path / "runs", Stop())
    (alone,) = run([replace(configs[1], out=str(tmp_path / "alone"))], tmp_path / "new", Stop())

    assert [str(card.site) for card in cards] == ["resid_post.1", "mlp_out.2"]
    assert cards[1].sha256 == alone.sha256


def test_dictionaries_inside_sublayers_are_trained_measured_and_interpreted(
    config: TrainConfig, tmp_path: Path
) -> None:
    """The MLP of the tiny model is twice as wide as the model."""
    configs = [
        replace(config, site=site, out=str(tmp_path / site), epochs=1)
        for site in ("attn_z.2", "mlp_act.2")
    ]

    cards = run(configs, tmp_path / "runs", Stop())

    assert [card.d_model for card in cards] == [16, 32]
    for card, one in zip(cards, configs, strict=True):
        assert card.quality == evaluate_again(Path(one.out), None, [], None, Stop())
        assert card.quality is not None
        assert card.quality.fvu < 1
        evidence = load(Path(one.out)).evidence
        assert all(entry.logits_up[0][1] > 0 for entry in evidence.values())


def test_a_control_is_trained_and_measured_on_random_weights_and_not_served(
    config: TrainConfig, tmp_path: Path
) -> None:
    # The tiny model's own weights are drawn with seed 0.
    control = replace(config, weights="random", data_seed=7, out=str(tmp_path / "control"))

    trained, random = (run([c], tmp_path / "runs", Stop())[0] for c in (config, control))

    shape = json.loads((Path(config.model) / "config.json").read_text())
    assert random.model.weights == "random"
    assert random.model.config_digest == trained.model.config_digest
    assert config.harvest_digest != control.harvest_digest
    assert random.quality is not None
    assert trained.quality is not None
    assert random.quality.ce != trained.quality.ce
    assert evaluate_again(Path(control.out), None, [], None, Stop()) == random.quality
    with pytest.raises(DictionaryMismatch, match="with random weights, not trained ones"):
        load(Path(control.out), shape)


def test_random_weights_come_from_the_seed_and_nothing_else_is_drawn(model_folder: Path) -> None:
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)

    models = [load_model(str(model_folder), "random", seed) for seed in (1, 1, 2)]

    assert torch.equal(torch.rand(1), expected)
    first, same, other = (torch.cat([p.flatten() for p in m.parameters()]) for m in models)
    assert torch.equal(first, same)
    assert not torch.allclose(first, other)
    real = torch.cat([p.flatten() for p in load_model(str(model_folder)).parameters()])
    assert first.shape == real.shape
    assert not torch.allclose(first, real)
