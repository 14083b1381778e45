"""The transformer, or a run of its blocks. B sequences, S positions, D width, V vocabulary, L MoE blocks, E experts,
R numbers of a routing record."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from moe_dtensor.config.resolve import moe_layers, padded_vocab
from moe_dtensor.config.schema import Config
from moe_dtensor.kernels.cross_entropy import cross_entropy, held_ids
from moe_dtensor.layers.block import AlsoMinimize, Block, MtpBlock, labels_ahead, tokens_ahead
from moe_dtensor.layers.positions import Positions, build_positions
from moe_dtensor.layers.tokens import Tokens, build_tokens
from moe_dtensor.layers.weights import Embedding, Linear, build_norm

TokenLoss = Callable[[Tensor, Tensor], Tensor]
"""``(logits (B, S, V), labels (B, S))`` to a loss for each token ``(B, S)``, 0 where the label is -100. V are the held
rows of the head, padding included."""


class Transformer(nn.Module):
    """A decoder-only transformer; a pipeline stage is the same class with fewer blocks.

    Args:
        config: resolved.
        layers: indices of the blocks to hold.
        first: hold the embedding.
        last: hold the final norm and the head.
    """

    def __init__(self, config: Config, layers: Iterable[int], first: bool = True, last: bool = True) -> None:
        super().__init__()
        rows, dim, with_experts = padded_vocab(config), config.model.dim, moe_layers(config)
        layers = list(layers)
        self.is_first, self.is_last = first, last
        if first:
            self.tok_embeddings = Embedding(rows, dim)
        # Keyed by the index in the whole model, so that names do not depend on the split.
        blocks = config.model.num_layers
        self.layers = nn.ModuleDict({str(i): (Block if i < blocks else MtpBlock)(config, i) for i in layers})
        self.mtp_depth = config.model.mtp_depth
        self.mtp_weight = config.training.mtp_weight / max(1, self.mtp_depth)
        if last:
            self.norm = build_norm(config)
            if not config.model.tie_embeddings:
                self.output = Linear(dim, rows, config.model.head_bias)
        self.config = config
        self.dim = dim
        self.embedding_scale, self.logit_scale = config.model.embedding_scale, config.model.logit_scale
        self.vocab_size = config.model.vocab_size
        self.first_row = 0
        """Global id of the head's first held row."""
        self.token_loss: TokenLoss = partial(_cross_entropy, vocab_size=self.vocab_size)
        self.before_head: Callable[[Tensor], Tensor] = _identity
        self.attended: Callable[[Tensor], Tensor] = _identity
        """Of ``(B, ...)`` the sequences that attention has the vectors of."""
        self.routed: Callable[[Tensor], Tensor] = _identity
        """The same of routers."""
        self.moe_layers = [i for i in layers if i in with_experts]
        self.record_LR: Tensor | None = None
        """Routing of each MoE block since the last :meth:`take_record`, of the tokens seen here."""
        self.mtp_loss_K: Tensor | None = None
        """Summed loss of each depth of multi-token prediction since the last :meth:`take_mtp_loss`."""
        self.records_evaluation = False
        """Whether forward passes of evaluation add to the record too."""
        self.sequence_losses: list[tuple[Tensor, Tensor]] | None = None
        """(sequence_B, loss_B) of every microbatch, for who sets it to a list."""

    def forward(
        self,
        x: Tensor,
        labels_BS: Tensor | None = None,
        positions_BS: Tensor | None = None,
        documents_BS: Tensor | None = None,
        tokens_BS: Tensor | None = None,
        sequence_B: Tensor | None = None,
        positions: Positions | None = None,
    ) -> Tensor:
        """Run the held blocks.

        Args:
            x: tokens ``(B, S)`` if this is the first part, else what the part before gave.
            labels_BS: next tokens, -100 where there is none; the last part then returns losses.
            positions_BS: position of each token in its document; None: in its sequence.
            documents_BS: document of each token; None: no document mask.
            tokens_BS: the tokens, for a part that is not the first.
            sequence_B: number of each sequence in the run; None: from 0.
            positions: rotations made already, for who remembers earlier tokens; None: of ``positions_BS``.

        Returns:
            The stream ``(B, S, D)``, beside it the embeddings of tokens ahead if multi-token prediction is to read
            them; from the last part the summed loss of each sequence ``(B,)``, or without labels the logits
            ``(B, S, ids held)``, without those of padding.
        """
        if self.is_first:
            tokens_BS = x
            depths = range(self.mtp_depth + 1) if self.training or not self.is_last else [0]
            x, *ahead = (self.embed(tokens_BS if k == 0 else tokens_ahead(tokens_BS, k)) for k in depths)
        else:
            x, *ahead = x.split(self.dim, dim=-1)
        assert tokens_BS is not None
        tokens = Tokens(*map(self.routed, build_tokens(tokens_BS, sequence_B)))
        attended_BS = self.attended(tokens_BS)
        positions = positions or build_positions(
            self.config,
            map(int, self.layers),
            (attended_BS.shape[0], attended_BS.shape[1]),
            None if positions_BS is None else self.attended(positions_BS),
            None if documents_BS is None else self.attended(documents_BS),
            dtype=x.dtype,
            device=x.device,
        )
        x, records = self._through_blocks(x, positions, tokens)
        if not self.is_last:
            self._keep(records)
            return torch.cat([x, *ahead], dim=-1) if self.mtp_depth else x
        x = self.norm(x)
        logits_BSV = self.logits(x)
        if labels_BS is None:
            self._keep(records)
            return logits_BSV[..., : held_ids(self.vocab_size, self.first_row, logits_BSV.shape[-1])]
        loss_B = self.token_loss(logits_BSV, labels_BS).sum(-1)
        if self.sequence_losses is not None and sequence_B is not None:
            self.sequence_losses.append((sequence_B, loss_B.detach()))
        if self.mtp_depth and self.training:
            loss_B = self._with_mtp(loss_B, x, ahead, labels_BS, documents_BS, positions, tokens, records)
        self._keep(records)
        return loss_B

    def _through_blocks(self, x: Tensor, positions: Positions, tokens: Tokens) -> tuple[Tensor, list[Tensor | None]]:
        """The stream after all blocks but those of multi-token prediction, and what their routers record."""
        records: list[Tensor | None] = []
        for block in self.layers.values():
            if not isinstance(block, MtpBlock):
                x, record_R = block(x, positions, tokens)
                records.append(record_R)
        return x, records

    def embed(self, tokens_BS: Tensor) -> Tensor:
        """The stream ``(B, S, D)`` before the first block."""
        x = self.tok_embeddings(tokens_BS)
        return x if self.embedding_scale == 1 else x * self.embedding_scale

    def logits(self, x: Tensor) -> Tensor:
        """Of the normalised stream: ``(B, S, V)`` over the held rows, padding included."""
        # The head's input is scaled, not the logits, which are many times as large.
        return self.head(self.before_head(x if self.logit_scale == 1 else x * self.logit_scale))

    def _with_mtp(
        self,
        loss_B: Tensor,
        x: Tensor,
        ahead: list[Tensor],
        labels_BS: Tensor,
        documents_BS: Tensor | None,
        positions: Positions,
        tokens: Tokens,
        records: list[Tensor | None],
    ) -> Tensor:
        """``loss_B``, whose gradient goes to the losses of multi-token prediction too (DeepSeek-V3, eq. 24 and 25)."""
        losses = []
        blocks = [block for block in self.layers.values() if isinstance(block, MtpBlock)]
        for depth, (block, ahead_BSD) in enumerate(zip(blocks, ahead, strict=True), start=1):
            x, record_R, normed = block(x, ahead_BSD, positions, tokens)
            records.append(record_R)
            labels = labels_ahead(labels_BS, documents_BS, depth)
            losses.append(self.token_loss(self.logits(normed), labels).sum(-1))
        loss_K = torch.stack([loss.detach().sum() for loss in losses])
        self.mtp_loss_K = _plus(self.mtp_loss_K, loss_K)
        return AlsoMinimize.apply(loss_B, self.mtp_weight * torch.stack(losses).sum(0))

    def _keep(self, records: list[Tensor | None]) -> None:
        """Add a forward pass's records to those of the step so far."""
        of_moe = [record_R for record_R in records if record_R is not None]
        if of_moe and (self.training or self.records_evaluation):
            self.record_LR = _plus(self.record_LR, torch.stack(of_moe))

    def head(self, x_BSD: Tensor) -> Tensor:
        """Logits ``(B, S, V)`` over the held rows of the vocabulary, padding included."""
        if hasattr(self, "output"):
            return self.output(x_BSD)
        return nn.functional.linear(x_BSD, self.tok_embeddings.local_weight("weight"))

    def take_record(self) -> Tensor | None:
        """The routing's record ``(L, R)`` since the last call, and start again; None without MoE blocks."""
        record_LR, self.record_LR = self.record_LR, None
        return record_LR

    def take_mtp_loss(self) -> Tensor | None:
        """The summed loss of each depth ``(K,)`` since the last call, and start again; None where there is none."""
        loss_K, self.mtp_loss_K = self.mtp_loss_K, None
        return loss_K

    def take_told(self) -> Told:
        """All that forward passes left since the last call, and start again."""
        losses, self.sequence_losses = self.sequence_losses, None if self.sequence_losses is None else []
        return Told(self.take_record(), self.take_mtp_loss(), losses)

    def add_told(self, told: Told) -> None:
        """Add what was taken."""
        if told.record_LR is not None:
            self.record_LR = _plus(self.record_LR, told.record_LR)
        if told.mtp_loss_K is not None:
            self.mtp_loss_K = _plus(self.mtp_loss_K, told.mtp_loss_K)
        if told.sequence_losses:
            self.sequence_losses = (self.sequence_losses or []) + told.sequence_losses


class Told(NamedTuple):
    """What forward passes leave in a model beside their output."""

    record_LR: Tensor | None
    mtp_loss_K: Tensor | None
    sequence_losses: list[tuple[Tensor, Tensor]] | None


def _plus(total: Tensor | None, more: Tensor) -> Tensor:
    return more if total is None else total + more


def _cross_entropy(logits_BSV: Tensor, labels_BS: Tensor, vocab_size: int) -> Tensor:
    loss_T = cross_entropy(logits_BSV.flatten(0, 1), labels_BS.flatten(), vocab_size=vocab_size)
    return loss_T.view(labels_BS.shape)


def _identity(x: Tensor) -> Tensor:
    return x
