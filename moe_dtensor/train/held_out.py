"""What is measured beside the steps: the validation loss, the texts of ``[eval]``, samples of text."""

from __future__ import annotations

from dataclasses import dataclass, replace

from moe_dtensor.config.schema import Config
from moe_dtensor.data import Corpus, Loader
from moe_dtensor.train.build import Trainer
from moe_dtensor.train.evaluation import Evaluation
from moe_dtensor.train.metrics import Value
from moe_dtensor.train.routing import load_metrics
from moe_dtensor.train.samples import Samples
from moe_dtensor.train.step import evaluate_batches, read_batch


@dataclass
class HeldOut:
    """Read before the first step, so that what is wrong is told then."""

    config: Config
    """Of the run; resolved."""
    corpus: Corpus
    loader: Loader | None
    """Of the validation split, where it is measured."""
    evaluation: Evaluation | None
    samples: Samples | None

    def is_due(self, step: int) -> bool:
        """Whether something is measured after a step."""
        return self._validates(step) or self._evaluates(step)

    def measure(self, trainer: Trainer, step: int) -> dict[str, Value]:
        """By name what is due after a step. Called by all ranks together."""
        values: dict[str, Value] = {}
        if self._validates(step):
            values |= self._validate(trainer)
        if self.evaluation is not None and self._evaluates(step):
            values |= self.evaluation.measure(trainer)
        if self.samples is not None:
            values["samples"] = self.samples.write(trainer)
        return values

    def enter_stage(self, config: Config) -> None:
        """Go on with the sizes of a stage."""
        if self.loader is not None:
            self.loader = Loader(replace(config, stages=()), self.corpus, "validation")

    def _validates(self, step: int) -> bool:
        return self.loader is not None and step % self.config.training.validation_interval == 0

    def _evaluates(self, step: int) -> bool:
        return self.evaluation is not None and step % self.evaluation.interval == 0

    def _validate(self, trainer: Trainer) -> dict[str, Value]:
        """Mean loss of the targets in ``training.validation_sequences`` held-out sequences, the same every time."""
        loader = self.loader
        assert loader is not None
        start = loader.state_dict()
        training = trainer.config.training
        batches = training.validation_sequences // training.global_batch_size
        found = evaluate_batches(trainer, (read_batch(trainer, loader) for _ in range(batches)))
        loader.load_state_dict(start)
        return {"validation_loss": found.mean, **load_metrics("validation_", found.load_LE)}


def build_held_out(config: Config, corpus: Corpus) -> HeldOut:
    """All that ``config`` (resolved) asks for.

    Raises:
        ConfigError: a split that is too small, a text that cannot be read.
    """
    return HeldOut(
        config,
        corpus,
        Loader(config, corpus, "validation") if config.training.validation_interval else None,
        Evaluation(config, corpus.tokenizer) if config.eval.interval else None,
        Samples(config, corpus.tokenizer) if config.training.sample_prompts else None,
    )
