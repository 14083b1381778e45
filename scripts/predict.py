"""What ``plan`` reckons for every variant of presets on so many GPUs, before anything runs: tokens/s under each
routing, where a step's time goes, memory.

cd train_configs && python ../scripts/predict.py --config olmoe_small.toml olmoe_1b_7b.toml qwen3_30b_a3b.toml \
    --microbatch 8 2 1 --variants variants/eight_gpus.toml --gpus 8 --json ../docs/results/plan_8_gpus.json
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from moe_dtensor.config.errors import ConfigError
from moe_dtensor.config.load import load, load_variants, override
from moe_dtensor.config.schema import Config
from moe_dtensor.estimate.memory import fullest_rank
from moe_dtensor.estimate.speed import ROUTINGS, Speeds, step_time, tokens_per_second
from moe_dtensor.verbs.plan import make_plan


def predict(config: Config, gpus: int) -> dict[str, Any]:
    """The prediction, or why so many GPUs cannot run it."""
    try:
        placed = make_plan(config, gpus).config
    except ConfigError as error:
        return {"refused": str(error)}
    times = {routing: step_time(placed, Speeds(), routing) for routing in ROUTINGS}
    return {
        "mesh": f"{placed.mesh.dp}x{placed.mesh.pp}x{placed.mesh.tp}",
        "tokens_per_second": {name: round(tokens_per_second(placed, time)) for name, time in times.items()},
        "milliseconds": {name: round(1e3 * part, 2) for name, part in asdict(times["learned"]).items()},
        "peak_memory_gib": round(fullest_rank(placed)[1].peak / 2**30, 1),
        "peak_memory_gib_skewed": round(fullest_rank(placed, True)[1].peak / 2**30, 1),
    }


def main() -> None:
    """Write them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, nargs="+", required=True)
    parser.add_argument("--variants", type=Path, required=True)
    parser.add_argument("--gpus", type=int, required=True)
    parser.add_argument("--microbatch", type=int, nargs="*", default=[], help="sequences in a forward, of each config")
    parser.add_argument("--json", type=Path, required=True)
    options = parser.parse_args()
    found: dict[str, Any] = {}
    for i, path in enumerate(options.config):
        config = load(path)
        if options.microbatch:
            config = override(config, {"training.microbatch_size": options.microbatch[i]})
        variants = load_variants(options.variants, config)
        found[path.stem] = {name: predict(variant, options.gpus) for name, variant in variants.items()}
    record = {"gpus": options.gpus, "speeds": asdict(Speeds()), "predictions": found}
    options.json.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
