"""What the tests of routing share: a router by its config keys, tokens, loads."""

from __future__ import annotations

import torch
from torch import Tensor

from moe_dtensor.config.load import override
from moe_dtensor.config.resolve import resolve
from moe_dtensor.config.schema import Config
from moe_dtensor.layers.router import Router, Routing
from moe_dtensor.layers.tokens import Tokens, build_tokens

EXPERTS, SEQUENCES, LENGTH, WIDTH = 8, 4, 64, 16


def build_router(layer: int = 0, **keys: object) -> Router:
    """In float64 and training mode; ``top_k = 4`` is a key of ``[moe]``."""
    base = {"moe.num_experts": EXPERTS, "moe.top_k": 2, "training.microbatch_size": SEQUENCES}
    base |= {"model.dim": WIDTH, "training.seq_len": LENGTH}
    table = {key.replace("__", ".") if "__" in key else f"moe.{key}": value for key, value in keys.items()}
    router = Router(resolve(override(Config(), base | table), 1), layer).double()
    torch.manual_seed(1)
    torch.nn.init.normal_(router.weight)
    return router.train()


def vectors(sequences: int = SEQUENCES, length: int = LENGTH) -> Tensor:
    """Tokens that are more alike than chance, so that plain top-k is not balanced."""
    generator = torch.Generator().manual_seed(2)
    x_BSD = torch.randn(sequences, length, WIDTH, generator=generator, dtype=torch.float64)
    return x_BSD + 2 * torch.randn(WIDTH, generator=generator, dtype=torch.float64)


def tokens(sequences: int = SEQUENCES, length: int = LENGTH) -> Tokens:
    ids = torch.randint(0, 50, (sequences, length), generator=torch.Generator().manual_seed(3))
    return build_tokens(ids, None)


def route(router: Router, x_BSD: Tensor | None = None) -> Routing:
    x_BSD = vectors() if x_BSD is None else x_BSD
    return route_tokens(router, x_BSD, tokens(*x_BSD.shape[:2]))


def route_tokens(router: Router, x_BSD: Tensor, tokens: Tokens) -> Routing:
    return router(router.score(x_BSD, tokens), tokens)


def load(expert: Tensor, experts: int = EXPERTS) -> Tensor:
    """Copies by expert; ids of -1 are none."""
    return torch.bincount(expert[expert >= 0].flatten(), minlength=experts)
