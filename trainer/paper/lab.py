"""What experiments work with: the model, its tokenizer, its dictionaries and held-out text, each loaded when first asked for."""

from functools import cache, cached_property
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from steer_server.dictionary.files import StoredDictionary, check_model, load
from trainer.config import TrainConfig, from_mapping
from trainer.errors import BadConfig
from trainer.model import load_model, load_tokenizer, shape_of
from trainer.paper.config import PaperConfig
from trainer.paper.results import Results
from trainer.stop import Stop
from trainer.tokens import pack


class Lab:
    """For the experiments of one configuration."""

    def __init__(self, config: PaperConfig, stop: Stop) -> None:
        self.config = config
        self.stop = stop
        self.dictionary = cache(self._dictionary)
        self.heldout = cache(self._heldout)
        self.model = cache(self._model)
        torch.set_num_threads(config.threads)

    def results(self, experiment: str) -> Results:
        """Where an experiment keeps what it has found."""
        return Results(Path(self.config.out) / experiment)

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        return load_tokenizer(self.config.model)

    @cached_property
    def texts(self) -> list[str]:
        """Of every token."""
        return [str(self.tokenizer.decode([token])) for token in range(len(self.tokenizer))]

    def model_of(self, stored: StoredDictionary) -> nn.Module:
        """What the dictionary was trained on: the model, or its copy before training."""
        config = training(stored)
        return self.model(config.weights, config.data_seed if config.weights == "random" else 0)

    def _model(self, weights: str = "trained", seed: int = 0) -> nn.Module:
        return load_model(self.config.model, weights, seed)

    def _dictionary(self, folder: str) -> StoredDictionary:
        """The dictionary in the folder, which must be one of this model."""
        if not Path(folder).is_dir():
            raise BadConfig(
                f"there is no dictionary in {folder}; `trainings` names the configurations that make it"
            )
        stored = load(Path(folder))
        check_model(stored.card, shape_of(self.config.model), training(stored).weights)
        return stored

    def _heldout(self, tokens: int, context: int) -> Tensor:
        """Contexts of documents that no training saw, int32, contexts x context."""
        config = TrainConfig(
            model=self.config.model,
            site="resid_post.0",
            corpus=self.config.corpus,
            out="unused",
            tokens=context,
            eval_tokens=tokens,
            n_features=1,
            k=1,
            context=context,
            holdout_every=self.config.holdout_every,
        )
        return pack(config, self.tokenizer, self.stop, ["heldout"])["heldout"]


def training(stored: StoredDictionary) -> TrainConfig:
    """How the dictionary was trained."""
    if "config" not in stored.card.training:
        raise BadConfig(f"the card of {stored.card.name!r} says nothing of how it was trained")
    return from_mapping({"architecture": stored.card.architecture} | stored.card.training["config"])
