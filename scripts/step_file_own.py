"""Write a step file of this library's own trainer on CPU ranks: a miniature of a config, as ``verify`` makes it.

python scripts/step_file_own.py OUT.json [--config F] [--mesh DPxPPxTP] [--schedule NAME] [--dtype float32]
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moe_dtensor import __version__
from moe_dtensor.config.errors import ConfigError
from moe_dtensor.config.load import load, override
from moe_dtensor.config.schema import Config
from moe_dtensor.testing.ranks import run_on_ranks
from moe_dtensor.train.step import train_step
from moe_dtensor.verify.inputs import global_batch, initial_values
from moe_dtensor.verify.miniature import Layout, shrink
from moe_dtensor.verify.oracle import Microbatch
from moe_dtensor.verify.step_file import write_step_file
from moe_dtensor.verify.subject import build_subject, full_parameters, own_share

DEBUG = Path(__file__).parents[1] / "train_configs" / "debug.toml"
TABLES = ("model", "rope", "moe", "optimizer", "lr_scheduler")
KEYS = ("microbatch_size", "max_grad_norm", "norm_type", "mtp_weight", "seed")
"""Of [training], what decides a step's gradients and update."""


def export(path: Path, config: Config, layout: Layout, dtype: str = "float64") -> None:
    """One step of the library's trainer: loss, every gradient before clipping, every parameter after the update.

    Args:
        path: of the JSON.
        config: not resolved.
        layout: mesh and schedule; its ranks are processes of this machine.
        dtype: of computation and weights.

    Raises:
        ConfigError: the layout does not take the config, or a step file cannot tell all of it.
    """
    if config.data.document_mask or config.moe.selection_bias or config.moe.bias_rate:
        raise ConfigError(
            "A step file holds tokens and labels, no documents and no biases of the choice.",
            "Give a config without data.document_mask, moe.selection_bias and moe.bias_rate.",
        )
    # Padding of the vocabulary has no place in a step file.
    small = override(shrink(config, [layout], dtype), {"model.vocab_size": 256})
    placed = layout.place(small)
    initial, batch = initial_values(placed), global_batch(placed)
    ranks = run_on_ranks(_step, layout.world_size, placed, initial, batch, timeout=600.0)
    gradients = {name: value for rank in ranks for name, value in rank[1].items()}
    after = {name: value for rank in ranks for name, value in rank[2].items()}
    write_step_file(
        path,
        config=_told(small),
        trainer=f"moe_dtensor {__version__} on {layout.mesh} {layout.schedule}",
        dtype=dtype,
        loss=ranks[0][0],
        batch={name: torch.cat([getattr(m, name) for m in batch]) for name in ("tokens", "labels")},
        tensors={"weights": initial, "gradients": gradients, "after": after},
        names={name: name for name in initial},
    )


def _step(
    config: Config, initial: dict[str, Tensor], batch: Sequence[Microbatch]
) -> tuple[float, dict[str, Tensor], dict[str, Tensor]]:
    """On each rank: the loss, and the whole gradients and parameters of the parts that it holds."""
    trainer, recorder = build_subject(config, initial, torch.device("cpu"))
    loss = float(train_step(trainer, own_share(trainer, batch)).loss)
    gradients = {name: value for name, value in recorder.gradients.items() if value is not None}
    return loss, gradients, full_parameters(trainer)


def _told(config: Config) -> dict[str, dict[str, Any]]:
    """The tables of a step file."""
    tables = asdict(config)
    told = {table: tables[table] for table in TABLES}
    return told | {"training": {key: tables["training"][key] for key in KEYS}}


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--config", type=Path, default=DEBUG)
    parser.add_argument("--mesh", default="1x1x2", metavar="DPxPPxTP")
    parser.add_argument("--schedule", help="default: the config's")
    parser.add_argument("--dtype", default="float64", choices=("float64", "float32"))
    options = parser.parse_args()
    config = load(options.config)
    dp, pp, tp = map(int, options.mesh.split("x"))
    schedule = (options.schedule or config.pipeline.schedule) if pp > 1 else "none"
    export(options.out, config, Layout(dp, pp, tp, schedule), options.dtype)


if __name__ == "__main__":
    main()
