"""The transformer, or a run of its blocks. B sequences, S positions, D width, V vocabulary, L MoE blocks, E experts,
R numbers of a routing record."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from moe_dtensor.config.resolve import moe_layers, padded_vocab
from moe_dtensor.config.schema import Config
from moe_dtensor.kernels.cross_entropy import cross_entropy
from moe_dtensor.layers.block import Block
from moe_dtensor.layers.embedding import Embedding
from moe_dtensor.layers.norm import build_norm
from moe_dtensor.layers.rope import build_positions
from moe_dtensor.layers.tokens import build_tokens

TokenLoss = Callable[[Tensor, Tensor], Tensor]
"""``(logits (B, S, V), labels (B, S))`` to a loss for each token ``(B, S)``, 0 where the label is -100."""


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
        self.layers = nn.ModuleDict({str(i): Block(config, i) for i in layers})
        if last:
            self.norm = build_norm(config)
            if not config.model.tie_embeddings:
                self.output = nn.Linear(dim, rows, bias=False)
        self.seq_len, self.head_dim, self.rope_theta = (
            config.training.seq_len,
            config.model.head_dim,
            config.model.rope_theta,
        )
        self.embedding_scale, self.logit_scale = config.model.embedding_scale, config.model.logit_scale
        self.token_loss: TokenLoss = _cross_entropy
        self.before_head: Callable[[Tensor], Tensor] = _identity
        self.moe_layers = [i for i in layers if i in with_experts]
        self.record_LR: Tensor | None = None
        """Routing of each MoE block since the last :meth:`take_record`, of the tokens seen here."""

    def forward(
        self,
        x: Tensor,
        labels_BS: Tensor | None = None,
        positions_BS: Tensor | None = None,
        documents_BS: Tensor | None = None,
        tokens_BS: Tensor | None = None,
        sequence_B: Tensor | None = None,
    ) -> Tensor:
        """Run the held blocks.

        Args:
            x: tokens ``(B, S)`` if this is the first part, else the stream ``(B, S, D)``.
            labels_BS: next tokens, -100 where there is none; the last part then returns losses.
            positions_BS: position of each token in its document; None: in its sequence.
            documents_BS: document of each token; None: no document mask.
            tokens_BS: the tokens, for a part that is not the first.
            sequence_B: number of each sequence in the run; None: from 0.

        Returns:
            The stream ``(B, S, D)``; from the last part the summed loss of each sequence ``(B,)``,
            or without labels the logits ``(B, S, V)``.
        """
        if self.is_first:
            tokens_BS, x = x, self.tok_embeddings(x)
            x = x if self.embedding_scale == 1 else x * self.embedding_scale
        assert tokens_BS is not None
        tokens = build_tokens(tokens_BS, sequence_B)
        positions = build_positions(
            self.seq_len,
            positions_BS,
            documents_BS,
            head_dim=self.head_dim,
            theta=self.rope_theta,
            dtype=x.dtype,
            device=x.device,
        )
        records = []
        for block in self.layers.values():
            x, record_R = block(x, positions, tokens)
            if record_R is not None:
                records.append(record_R)
        if records and self.training:
            record_LR = torch.stack(records)
            self.record_LR = record_LR if self.record_LR is None else self.record_LR + record_LR
        if not self.is_last:
            return x
        # The head's input, not the logits, which are many times as large.
        x = self.norm(x) if self.logit_scale == 1 else self.norm(x) * self.logit_scale
        logits_BSV = self.head(self.before_head(x))
        return logits_BSV if labels_BS is None else self.token_loss(logits_BSV, labels_BS).sum(-1)

    def head(self, x_BSD: Tensor) -> Tensor:
        """Logits ``(B, S, V)`` over the held rows of the vocabulary."""
        if hasattr(self, "output"):
            return self.output(x_BSD)
        return nn.functional.linear(x_BSD, self.tok_embeddings.weight)

    def take_record(self) -> Tensor | None:
        """The routing's record ``(L, R)`` since the last call, and start again; None without MoE blocks."""
        record_LR, self.record_LR = self.record_LR, None
        return record_LR


def _cross_entropy(logits_BSV: Tensor, labels_BS: Tensor) -> Tensor:
    return cross_entropy(logits_BSV.flatten(0, 1), labels_BS.flatten()).view(labels_BS.shape)


def _identity(x: Tensor) -> Tensor:
    return x
