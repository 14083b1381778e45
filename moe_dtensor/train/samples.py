"""Text that the model writes while it trains: ``training.sample_prompts``. B prompts, S seq_len, V vocabulary."""

from __future__ import annotations

import torch
from torch import Tensor

from moe_dtensor.config.schema import Config
from moe_dtensor.data.loader import IGNORED, Batch
from moe_dtensor.data.tokenizer import Tokenizer
from moe_dtensor.generate.decoder import whole_vocabulary
from moe_dtensor.generate.sampling import Sampler, Sampling
from moe_dtensor.kernels.cross_entropy import held_ids
from moe_dtensor.train.build import Trainer
from moe_dtensor.train.step import to_device


class Samples:
    """The prompts, and how they are continued. Nothing is remembered between tokens: each is a forward pass of
    evaluation, of the shape of a microbatch, which every mesh with pp = 1 can take.

    Args:
        config: of the run.
        tokenizer: of the run.
    """

    def __init__(self, config: Config, tokenizer: Tokenizer) -> None:
        training = config.training
        self.prompts = training.sample_prompts
        self.count = training.sample_tokens
        self.sampling = Sampling(training.sample_temperature, seed=training.seed)
        self.tokenizer = tokenizer
        encoded = tokenizer.encode_batch(list(self.prompts)) if self.prompts else []
        self.ids = [[int(i) for i in ids] or [tokenizer.end_id] for ids in encoded]

    def write(self, trainer: Trainer) -> dict[str, str]:
        """The continuation of each prompt up to its end, or to so many tokens. Called by all ranks together; every dp
        rank writes all of them."""
        training = trainer.config.training
        kept = [ids[-(training.seq_len - self.count) :] for ids in self.ids]
        rows = -(-len(kept) // training.microbatch_size) * training.microbatch_size
        tokens_BS = torch.zeros(rows, training.seq_len, dtype=torch.int64)
        for row in range(rows):
            ids = kept[row % len(kept)]
            tokens_BS[row, : len(ids)] = torch.tensor(ids)
        last_B = torch.tensor([len(kept[row % len(kept)]) - 1 for row in range(rows)])
        # Drawn in the same way each time, so that what differs is the model.
        sampler = Sampler(self.sampling, range(rows))
        for _ in range(self.count):
            new_B = sampler(next_logits(trainer, tokens_BS, last_B)).cpu()
            last_B = last_B + 1
            tokens_BS[torch.arange(rows), last_B] = new_B
        made = [tokens_BS[row, len(ids) : len(ids) + self.count].tolist() for row, ids in enumerate(kept)]
        return {prompt: self._text(ids) for prompt, ids in zip(self.prompts, made, strict=True)}

    def _text(self, ids: list[int]) -> str:
        end = self.tokenizer.end_id
        return self.tokenizer.decode(ids[: ids.index(end)] if end in ids else ids)


@torch.no_grad()
def next_logits(trainer: Trainer, tokens_BS: Tensor, last_B: Tensor) -> Tensor:
    """Logits ``(B, V)`` after position ``last_B`` of each sequence, the same on all ranks."""
    (part,) = trainer.parts
    rows = torch.arange(len(tokens_BS))
    labels_BS = torch.full_like(tokens_BS, IGNORED)
    labels_BS[rows, last_B] = 0
    token_loss, seen = part.token_loss, []

    def watch(logits_BSV: Tensor, labels_BS: Tensor) -> Tensor:
        held = held_ids(part.vocab_size, part.first_row, logits_BSV.shape[-1])
        asked_BV = logits_BSV[labels_BS != IGNORED][..., :held]
        seen.append(whole_vocabulary(asked_BV[:, None], trainer.config, trainer.mesh["tp"])[:, 0])
        return torch.zeros_like(labels_BS, dtype=torch.float32)

    part.token_loss = watch
    part.eval()
    try:
        trainer.runner.evaluate(to_device(Batch(tokens_BS, labels_BS, sequence_B=rows), trainer.device))
    finally:
        part.token_loss = token_loss
        part.train()
    return torch.cat(seen)
