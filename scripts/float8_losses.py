"""Loss curves with experts in float8 beside those in bfloat16, of several seeds: python scripts/float8_losses.py OUT

Trains ``olmoe_small``, made smaller by :data:`SETTINGS`, on every GPU of this machine, two runs at a time on each, and
writes their losses as JSON; ``--plot FILE.svg`` draws an existing one. 500 steps of 16 sequences of 1024 tokens.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path
from queue import Queue
from typing import Any

CONFIG = "train_configs/olmoe_small.toml"
SETTINGS = {
    "model.num_layers": "8",
    "training.seq_len": "1024",
    "training.global_batch_size": "16",
    "training.microbatch_size": "16",
    "training.validation_sequences": "256",
    "lr_scheduler.warmup_steps": "50",
    "compile.cuda_graph": "true",
    "checkpoint.enable": "false",
}
COLOURS = {"bfloat16": "#4477aa", "float8": "#ee6677"}
DTYPES = {"bfloat16": "param", "float8": "float8"}


def train(dtype: str, seed: int, steps: int, folder: Path, device: str) -> dict[str, Any]:
    """One run; its losses, and the held-out loss after it."""
    run = folder / f"{dtype}_{seed}"
    keys = SETTINGS | {
        "moe.expert_dtype": DTYPES[dtype],
        "training.seed": str(seed),
        "training.steps": str(steps),
        "training.validation_interval": str(steps),
        "run.folder": str(run),
    }
    words = [word for key, value in keys.items() for word in (f"--{key}", value)]
    done = subprocess.run(
        [sys.executable, "-m", "moe_dtensor", "train", "--config", CONFIG, *words],
        env={**os.environ, "CUDA_VISIBLE_DEVICES": device},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(f"{dtype}, seed {seed}: {done.stdout[-1500:]}{done.stderr[-1500:]}")
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    losses = [round(record["loss"], 4) for record in records if "loss" in record]
    held_out = next(record["validation_loss"] for record in reversed(records) if "validation_loss" in record)
    print(f"{dtype} seed {seed}: last 50 steps {sum(losses[-50:]) / 50:.4f}, held out {held_out:.4f}", flush=True)
    return {"dtype": dtype, "seed": seed, "held_out": held_out, "losses": losses}


def plot(record: dict[str, Any], path: Path) -> None:
    """Means over 20 steps of each run, and float8 less bfloat16 of the same seed."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    grey = "#808080"  # legible on white and on black
    pyplot.rcParams.update({f"{what}.color": grey for what in ("text", "xtick", "ytick")})
    pyplot.rcParams.update({"axes.labelcolor": grey, "axes.edgecolor": grey, "svg.fonttype": "none"})
    figure, (above, below) = pyplot.subplots(2, 1, figsize=(7, 6), sharex=True, height_ratios=(3, 2))
    smooth = {(run["dtype"], run["seed"]): means(run["losses"]) for run in record["runs"]}
    for (dtype, seed), values in smooth.items():
        colour = COLOURS[dtype]
        label = dtype if seed == record["runs"][0]["seed"] else None
        above.plot(range(20, 20 * len(values) + 1, 20), values, color=colour, label=label, linewidth=1)
    seeds = sorted({seed for _, seed in smooth})
    first = seeds[0]
    for seed in seeds:
        apart = [a - b for a, b in zip(smooth["float8", seed], smooth["bfloat16", seed], strict=True)]
        below.plot(range(20, 20 * len(apart) + 1, 20), apart, color=COLOURS["float8"], linewidth=1)
    for seed in seeds[1:]:
        apart = [a - b for a, b in zip(smooth["bfloat16", seed], smooth["bfloat16", first], strict=True)]
        below.plot(range(20, 20 * len(apart) + 1, 20), apart, color=COLOURS["bfloat16"], linewidth=1)
    below.axhline(0, color="grey", linewidth=0.5)
    above.set_ylabel("loss, means of 20 steps")
    above.legend(frameon=False)
    below.set_ylabel("difference")
    below.set_xlabel("step; below, red: float8 less bfloat16, blue: one seed less the other")
    figure.tight_layout()
    figure.savefig(path, transparent=True, metadata={"Date": None})


def means(losses: list[float], width: int = 20) -> list[float]:
    """Of each ``width`` steps."""
    return [sum(losses[i : i + width]) / width for i in range(0, len(losses) - width + 1, width)]


def main() -> None:
    """Train or draw."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path, help="JSON of the losses")
    parser.add_argument("--plot", type=Path, help="draw OUT instead of making it")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--steps", type=int, default=500)
    options = parser.parse_args()
    if options.plot:
        plot(json.loads(options.out.read_text(encoding="utf-8")), options.plot)
        return
    import torch

    from moe_dtensor.bench.measure import provenance

    free: Queue[str] = Queue()
    for device in [*range(torch.cuda.device_count())] * 2:
        free.put(str(device))

    def one(job: tuple[str, int]) -> dict[str, Any]:
        device = free.get()
        try:
            return train(*job, options.steps, Path(folder), device)
        finally:
            free.put(device)

    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(free.qsize()) as pool:
        runs = list(pool.map(one, product(DTYPES, options.seeds)))
    content = provenance() | {"config": CONFIG, "settings": SETTINGS, "steps": options.steps, "runs": runs}
    options.out.write_text(json.dumps(content) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
