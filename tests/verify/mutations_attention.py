"""Known ways to get attention on meshes wrong, each a context manager as in ``mutations.py``."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

from torch import Tensor

from moe_dtensor.kernels import attention as kernels
from moe_dtensor.layers import attention, feed_forward

from .mutations import _gradient_of


@contextmanager
def latent_not_summed() -> Iterator[None]:
    """Each tp rank takes what its own heads say of the latents' projections for all there is."""
    yield from _gradient_of("w(q|kv)_a")


@contextmanager
def output_bias_of_every_rank() -> Iterator[None]:
    """The bias is added before the ranks' parts are summed."""
    right = attention.Attention.forward

    def wrong(self: attention.Attention, x: Tensor, positions: Any) -> Tensor:
        sum_output, bias = self.sum_output, self.output_bias
        self.sum_output, self.output_bias = lambda y: sum_output(y + self.weight_views["output_bias"](self, "b")), None
        self._parameters["b"] = bias
        try:
            return right(self, x, positions)
        finally:
            del self._parameters["b"]
            self.sum_output, self.output_bias = sum_output, bias

    with mock.patch.object(attention.Attention, "forward", wrong):
        yield


@contextmanager
def sink_without_gradient() -> Iterator[None]:
    right = attention.attend

    def wrong(*args: Any, sink_H: Tensor, **kwargs: Any) -> Tensor:
        return right(*args, sink_H=sink_H.detach(), **kwargs)

    with mock.patch.object(attention, "attend", wrong):
        yield


@contextmanager
def window_off_by_one() -> Iterator[None]:
    """A query sees one position more."""
    right = kernels.first_visible

    def wrong(documents: Any, window: int, *args: Any) -> Tensor:
        return right(documents, window + 1, *args)

    with mock.patch.object(kernels, "first_visible", wrong):
        yield


@contextmanager
def ffn_bias_of_every_rank() -> Iterator[None]:
    """The feed-forward's bias is added before the ranks' parts are summed."""

    def wrong(self: feed_forward.FeedForward, x: Tensor) -> Tensor:
        return self.sum_output(self.compute(x) + self.local_weight("output_bias"))

    with mock.patch.object(feed_forward.FeedForward, "forward", wrong):
        yield
