"""Rules about dtypes: what is kept, computed and summed in which. Loads no torch."""

from __future__ import annotations

from collections.abc import Iterator

from moe_dtensor.config.resolve import expert_shards, microbatches, state_dtype
from moe_dtensor.config.schema import Config

Broken = Iterator[tuple[str, str]]
BITS = {"bfloat16": 16, "float16": 16, "float32": 32, "float64": 64}


def check_precision(config: Config) -> Broken:
    """(rule with its values, remedy) for each broken rule of a resolved config."""
    yield from _dtypes(config)
    yield from _sums_of_experts(config)
    yield from _rounding(config)
    if config.optimizer.state_dtype != "auto":
        yield from _moments(config)


def _dtypes(config: Config) -> Broken:
    training, backend = config.training, config.moe.backend
    if training.dtype == "float16":
        yield (
            "training.dtype = float16: updates of master weights are below what it resolves, and squares of gradients "
            "below what it holds.",
            "Set training.dtype to float32, or bfloat16.",
        )
    if training.reduce_dtype == "float16":
        yield (
            f"training.reduce_dtype = float16 holds nothing above 65,504, which gradients computed in "
            f"training.param_dtype = {training.param_dtype} may sum to.",
            "Set training.reduce_dtype to float32, or bfloat16.",
        )
    if training.param_dtype == "float16":
        yield "training.param_dtype = float16 needs loss scaling, which is not here.", "Set it to bfloat16 or float32."
    if BITS[training.param_dtype] > BITS[training.dtype]:
        yield (
            f"training.param_dtype = {training.param_dtype} is wider than the master weights' "
            f"training.dtype = {training.dtype}.",
            f"Set training.dtype = {training.param_dtype}, or lower training.param_dtype.",
        )
    if BITS[training.reduce_dtype] < BITS[training.param_dtype]:
        yield (
            f"training.reduce_dtype = {training.reduce_dtype} is narrower than "
            f"training.param_dtype = {training.param_dtype}: gradients would lose digits when summed.",
            f"Set training.reduce_dtype = {training.param_dtype}.",
        )
    if config.fsdp.accumulate == "sharded" and BITS[training.dtype] < BITS[training.reduce_dtype]:
        yield (
            f"fsdp.accumulate = sharded adds shards up in training.dtype = {training.dtype}, which is narrower than "
            f"training.reduce_dtype = {training.reduce_dtype}.",
            "Set fsdp.accumulate = whole, or training.dtype = float32.",
        )
    if backend == "grouped_gemm" and training.param_dtype != "bfloat16":
        yield (
            f"moe.backend = grouped_gemm computes in bfloat16, not training.param_dtype = {training.param_dtype}.",
            "Set moe.backend to auto or reference, or training.param_dtype = bfloat16.",
        )
    if backend in ("torch", "triton") and training.param_dtype == "float64":
        yield (
            f"moe.backend = {backend} has no kernel for training.param_dtype = float64.",
            "Set moe.backend to auto or reference.",
        )


def _sums_of_experts(config: Config) -> Broken:
    training, own = config.training, config.mesh.experts in ("dp", "dp_tp") and expert_shards(config) == 1
    if own and microbatches(config) > 1 and BITS[training.dtype] < BITS[training.reduce_dtype]:
        yield (
            f"mesh.experts = {config.mesh.experts} adds gradients of {microbatches(config)} microbatches up "
            f"in training.dtype = {training.dtype}, which is narrower than training.reduce_dtype = "
            f"{training.reduce_dtype}.",
            "Set mesh.experts = tp, or training.dtype = float32.",
        )


def _moments(config: Config) -> Broken:
    # Rounded to nearest, a number of eight binary digits stays as it is where it changes by less than 2^-8 of itself.
    if state_dtype(config) == "bfloat16" and config.optimizer.beta2 > 1 - 2**-8:
        yield (
            f"optimizer.beta2 = {config.optimizer.beta2} with second moments in bfloat16: they would never decay.",
            "Set optimizer.beta2 to 0.996 or less, or optimizer.state_dtype = float32.",
        )


def _rounding(config: Config) -> Broken:
    training, rounding = config.training, config.optimizer.rounding
    if rounding != "nearest" and training.dtype != "bfloat16":
        yield (
            f"optimizer.rounding = {rounding} is for weights in bfloat16, not training.dtype = {training.dtype}.",
            "Set training.dtype = bfloat16, or optimizer.rounding = nearest.",
        )
