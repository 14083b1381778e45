"""What ``tests/gpu.sh`` runs: kernels, ``verify``, training, on the GPUs of this machine, and the record of it.

With 2, 4 or 8 GPUs ``verify`` runs on meshes of so many ranks; which machines have run it, docs/verify.md says.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from gpu_seen import tree_hashes

from moe_dtensor.bench.measure import provenance
from moe_dtensor.config.check_model import has_flash_attention_4

CONFIG = "train_configs/debug.toml"
SMALL = (
    *("--training.steps", "20", "--training.global_batch_size", "8", "--training.microbatch_size", "2"),
    *("--optimizer.lr", "1e-3", "--checkpoint.interval", "1000"),
)
TEN_STEPS = (
    *SMALL,
    *("--training.steps", "10", "--training.deterministic", "true", "--training.param_dtype", "bfloat16"),
    *("--checkpoint.interval", "5", "--checkpoint.keep_last", "0"),
)
NARROW = (
    *(*SMALL, "--training.steps", "10", "--training.dtype", "bfloat16", "--training.param_dtype", "bfloat16"),
    *("--optimizer.state_dtype", "bfloat16"),
)
FA4 = '[fa4]\nmodel.attention_backend = "fa4"\n'
FLOAT8 = '[float8]\nmoe.expert_dtype = "float8"\n'
PLACEMENTS = "train_configs/variants/placements.toml"
BETWEEN_RANKS = {
    "1x1x2": '[tp_one_sided]\nmesh.dispatch = "one_sided"\n[tp_lent]\nmesh.lent_experts = 1\n'
    "[tp_sequences]\ntraining.microbatch_size = 2\n"
    '[tp_attention]\nmesh.attention = "sequences"\ntraining.microbatch_size = 2\n',
    "2x1x1": '[dp_one_sided]\nmesh = { experts = "dp", dispatch = "one_sided" }\n'
    '[dp_lent]\nmesh = { experts = "dp", lent_experts = 1 }\n'
    '[limits]\nmoe = { router = "topk", bias_rate = 0.1, capacity_factor = 1.1, balance_loss = 0.1, '
    'balance_over = "batch" }\n',
}
"""Placements whose traffic is a matter of kernels and streams, by mesh: these are compiled too, which takes a minute
each."""
MESHES = {
    1: ["1x1x1"],
    2: ["1x1x2", "2x1x1", "1x2x1"],
    4: ["2x1x2", "1x2x2", "2x2x1", "4x1x1"],
    8: ["2x2x2", "4x1x2", "8x1x1"],
}
AT_ONCE = max(4, (os.cpu_count() or 1) * 3 // 8)
"""Parts side by side: the oracle, compilation and start-up take CPU cores, not the GPU."""


class Session:
    """Where parts run: a folder for what they write, the number of GPUs, and the time left."""

    def __init__(self, folder: Path, gpus: int, limit: float) -> None:
        self.folder, self.gpus = folder, gpus
        self.end = time.monotonic() + limit
        self.drawing = threading.Lock()

    def call(self, words: Sequence[str], name: str, **variables: str) -> None:
        """Run ``python words``; raises RuntimeError with the end of its output if it fails or time runs out."""
        left = self.end - time.monotonic()
        if left < 5:
            raise TimeoutError("not reached: no time was left")
        environment = {**os.environ, "OMP_NUM_THREADS": "4", "TORCHINDUCTOR_COMPILE_THREADS": "4", **variables}
        log = self.folder / f"{name}.log"
        with log.open("w") as file:
            done = subprocess.run(
                [sys.executable, *words], stdout=file, stderr=subprocess.STDOUT, env=environment, timeout=left
            )
        if done.returncode:
            raise RuntimeError(f"exit status {done.returncode}: {log.read_text(errors='replace')[-3000:]}")

    def drawn(self) -> Path:
        """A run of one step on the CPU, made once, whose weights the others start from."""
        with self.drawing:
            if not (self.folder / "drawn" / "metrics.jsonl").is_file():
                self.train("drawn", *SMALL, "--training.steps", "1", "--training.param_dtype", "float32", on_cpu=True)
        return self.folder / "drawn"

    def train(
        self, name: str, *options: str, on_cpu: bool = False, dp: bool = False, **variables: str
    ) -> list[dict[str, Any]]:
        """Train in a run folder of this name, the GPUs on tp or on dp; the metrics of each step."""
        ranks = 1 if on_cpu else self.gpus
        start = ["-m", "torch.distributed.run", "--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0"]
        start = [*start, f"--nproc-per-node={ranks}"] if ranks > 1 else []
        tp = ("--mesh.tp", "1" if dp else str(ranks))
        # Devices draw other numbers from the same seed: all start from weights that a CPU drew.
        if name != "drawn":
            options = (*options, "--checkpoint.initial", str(self.drawn()))
        run = ("-m", "moe_dtensor", "train", "--config", CONFIG, "--run.folder", str(self.folder / name))
        if on_cpu:
            variables = {"CUDA_VISIBLE_DEVICES": "", **variables}
        self.call([*start, *run, *tp, *options], f"{name}_train", CUBLAS_WORKSPACE_CONFIG=":4096:8", **variables)
        lines = (self.folder / name / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        return [json.loads(line) for line in lines]


def kernels(session: Session) -> dict[str, Any]:
    """The tests that need a GPU."""
    tests = ["tests/kernels/test_cuda.py", "tests/kernels/on_triton"]
    # No plugin that happens to be installed takes part: some warn, and warnings are errors.
    session.call(
        ["-m", "pytest", "-q", "-p", "no:cacheprovider", *tests], "kernels", PYTEST_DISABLE_PLUGIN_AUTOLOAD="1"
    )
    return {"summary": (session.folder / "kernels.log").read_text().strip().splitlines()[-1]}


def verify(
    dtype: str, backend: str, compiled: bool, mesh: str = "", variants: str = ""
) -> Callable[[Session], dict[str, Any]]:
    """``verify`` on a mesh, or on every one that the GPUs make; of several variants of the config, in a file or as
    TOML."""

    def part(session: Session) -> dict[str, Any]:
        name = f"verify_{dtype}_{backend}" + ("_compiled" if compiled else "")
        if variants:
            name += f"_{mesh}_" + (variants[1 : variants.index("]")] if variants[0] == "[" else Path(variants).stem)
        meshes = [mesh] if mesh else MESHES[session.gpus]
        out = session.folder / f"{name}.json"
        options = ["--dtype", dtype, "--backend", backend, *(["--compiled"] if compiled else [])]
        if variants.startswith("["):
            (session.folder / f"{name}.toml").write_text(variants, encoding="utf-8")
        if variants:
            options += ["--variants", str(session.folder / f"{name}.toml") if variants.startswith("[") else variants]
        words = ["-m", "moe_dtensor", "verify", "--config", CONFIG, "--meshes", *meshes, *options, "--json", str(out)]
        try:
            session.call(words, name)
        finally:
            found = json.loads(out.read_text()) if out.exists() else []
        return {"verdicts": found}

    return part


def losses(session: Session) -> dict[str, Any]:
    """20 steps in float32 and bfloat16 against float32 on the CPU."""
    runs = {"cpu": session.train("cpu", *SMALL, "--training.param_dtype", "float32", on_cpu=True)}
    for dtype in ("float32", "bfloat16"):
        runs[dtype] = session.train(dtype, *SMALL, "--training.param_dtype", dtype)
    found = {name: [record["loss"] for record in run] for name, run in runs.items()}
    far = {
        name: max(abs(a - b) / b for a, b in zip(found[name], found["cpu"], strict=True))
        for name in ("float32", "bfloat16")
    }
    result = {"losses": found, "largest_relative_difference": far}
    if not (far["float32"] < 1e-3 and far["bfloat16"] < 3e-2):
        raise RuntimeError(json.dumps(result))
    return result


def deterministic(session: Session) -> dict[str, Any]:
    """Ten steps twice, and once more from the checkpoint of step 5: losses, norms and weights to the last bit."""
    first, second = (numbers(session.train(name, *TEN_STEPS)) for name in ("first", "second"))
    again = session.folder / "resumed"
    shutil.copytree(session.folder / "first", again)
    shutil.rmtree(next((again / "checkpoints").glob("step-*10")))
    path = again / "run.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "finished_step": None}))
    resumed = numbers(session.train("resumed", *TEN_STEPS))
    log = (session.folder / "resumed_train.log").read_text()
    result = {
        "repeats": first == second and same_weights(session.folder / "first", session.folder / "second"),
        "resumes": first == resumed and same_weights(session.folder / "first", again) and "after step 5" in log,
        "steps": len(first),
    }
    if not (result["repeats"] and result["resumes"]):
        raise RuntimeError(json.dumps(result | {"first": first, "second": second, "resumed": resumed}))
    return result


def numbers(run: Sequence[dict[str, Any]]) -> list[tuple[float, float]]:
    """Of each step what must repeat."""
    return [(record["loss"], record["grad_norm"]) for record in run]


def same_weights(a: Path, b: Path) -> bool:
    """Whether the last checkpoints of two runs hold the same bits of model and optimizer."""
    from torch import Tensor, equal, load
    from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

    states = []
    for folder in (a, b):
        last = next((folder / "checkpoints").glob("step-*10"))
        dcp_to_torch_save(last, folder / "last.pt")
        state = load(folder / "last.pt", weights_only=False)
        states.append({f"{part}.{k}": v for part in ("model", "optimizer") for k, v in flat(state[part])})
    tensors = [{k: v for k, v in state.items() if isinstance(v, Tensor)} for state in states]
    return (
        len(tensors[0]) > 0
        and tensors[0].keys() == tensors[1].keys()
        and all(equal(tensors[0][k], tensors[1][k]) for k in tensors[0])
    )


def flat(tree: dict[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """Leaves by path."""
    items = [(f"{prefix}{key}", value) for key, value in tree.items()]
    return [leaf for k, v in items for leaf in (flat(v, f"{k}.") if isinstance(v, dict) else [(k, v)])]


def graphs(name: str, *options: str, dp: bool = True) -> Callable[[Session], dict[str, Any]]:
    """Ten steps, launched kernel by kernel and as CUDA graphs, the GPUs on dp or on tp: the same to the last bit."""

    def part(session: Session) -> dict[str, Any]:
        words = (*TEN_STEPS, *options, "--checkpoint.interval", "10")
        words = (*words, "--training.global_batch_size", str(max(8, 2 * session.gpus)))
        names = [f"graph_{name}_{on}" for on in ("false", "true")]
        launched, graph = (
            numbers(session.train(run, *words, "--compile.cuda_graph", on, dp=dp))
            for run, on in zip(names, ("false", "true"), strict=True)
        )
        same = same_weights(*(session.folder / run for run in names))
        if launched != graph or not same:
            raise RuntimeError(json.dumps({"launched": launched, "graph": graph, "same_weights": same}))
        return {"steps": len(launched)}

    return part


def offload(session: Session) -> dict[str, Any]:
    """Ten steps with weights in host memory: the losses of those without."""
    options = (*SMALL, "--training.steps", "10", "--training.param_dtype", "float32")
    kept, moved = (
        [r["loss"] for r in session.train(f"offload_{on}", *options, "--fsdp.cpu_offload", on)]
        for on in ("false", "true")
    )
    result = {"largest_relative_difference": max(abs(a - b) / a for a, b in zip(kept, moved, strict=True))}
    if not result["largest_relative_difference"] < 1e-3:
        raise RuntimeError(json.dumps(result | {"kept": kept, "moved": moved}))
    return result


def narrow_weights(session: Session) -> dict[str, Any]:
    """Ten steps with weights and moments in bfloat16, rounded by chance and with remainders: losses near those of
    float32 weights, and not the same under both."""
    want = [r["loss"] for r in session.train("wide", *SMALL, "--training.steps", "10")]
    found = {
        rounding: [r["loss"] for r in session.train(rounding, *NARROW, "--optimizer.rounding", rounding)]
        for rounding in ("stochastic", "remainder")
    }
    far = {name: max(abs(a - b) / b for a, b in zip(run, want, strict=True)) for name, run in found.items()}
    result = {"largest_relative_difference": far}
    if not max(far.values()) < 3e-2 or found["stochastic"] == found["remainder"]:
        raise RuntimeError(json.dumps(result | {"wide": want, **found}))
    return result


def parts(gpus: int) -> dict[str, Callable[[Session], dict[str, Any]]]:
    """By name, those that take longest first."""
    backends = ("torch", "triton", *(name for name in ("grouped_gemm", "quack") if find_spec(name)))
    extras = {}
    if find_spec("quack"):
        extras["verify bfloat16 quack compiled"] = verify("bfloat16", "quack", True)
    if has_flash_attention_4():
        extras["verify bfloat16 attention by fa4 compiled"] = verify("bfloat16", "auto", True, variants=FA4)
    between = {
        f"verify bfloat16 triton compiled between ranks {mesh}": verify("bfloat16", "triton", True, mesh, variants)
        for mesh, variants in BETWEEN_RANKS.items()
    }
    placed = {
        f"verify float32 triton placements {mesh}": verify("float32", "triton", False, mesh, PLACEMENTS)
        for mesh in BETWEEN_RANKS
    }
    worst, compiled = ("--moe.rows", "worst"), ("--compile.enable", "true")
    over_dp, one_sided = ("--mesh.experts", "dp"), ("--mesh.dispatch", "one_sided")
    with_collectives = {
        "cuda graphs tp": graphs("tp", *worst, dp=False),
        "cuda graphs tp compiled": graphs("tp_compiled", *worst, *compiled, dp=False),
        "cuda graphs experts over dp": graphs("experts_dp", *worst, *over_dp),
        "cuda graphs one-sided over dp": graphs("one_sided_dp", *worst, *over_dp, *one_sided, *compiled),
        "cuda graphs one-sided over tp": graphs("one_sided_tp", *worst, *one_sided, *compiled, dp=False),
    }
    return {
        "verify bfloat16 experts in float8 compiled": verify("bfloat16", "auto", True, variants=FLOAT8),
        "verify bfloat16 auto compiled": verify("bfloat16", "auto", True),
        "verify bfloat16 torch compiled": verify("bfloat16", "torch", True),
        "verify float32 auto compiled": verify("float32", "auto", True),
        **extras,
        "kernels": kernels,
        **(between if gpus > 1 else {}),
        "losses": losses,
        "deterministic and resumed": deterministic,
        "cuda graphs": graphs("eager"),
        "cuda graphs compiled": graphs("compiled", "--compile.enable", "true"),
        **(with_collectives if gpus > 1 else {}),
        "cpu offload": offload,
        "weights in bfloat16": narrow_weights,
        **(placed if gpus > 1 else {}),
        **{f"verify bfloat16 {b}": verify("bfloat16", b, False) for b in backends},
        **{f"verify float32 {b}": verify("float32", b, False) for b in ("torch", "triton")},
    }


def main() -> int:
    """Run all parts; 1 if one failed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, help="default: docs/results/<device>[x2]_proof.json")
    parser.add_argument("--limit", type=float, default=520.0, help="seconds for all of it")
    options = parser.parse_args()
    import torch

    gpus = max((count for count in MESHES if count <= torch.cuda.device_count()), default=0)
    if not gpus:
        print("error: torch sees no GPU here.", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory() as folder:
        session = Session(Path(folder), gpus, options.limit)
        with ThreadPoolExecutor(AT_ONCE) as pool:
            results = list(pool.map(lambda named: report(*named, session), parts(gpus).items()))
    device = torch.cuda.get_device_name()
    record = {
        "ok": all(result["ok"] for result in results),
        "gpus": gpus,
        **provenance(),
        "device": device,
        "cuda": torch.version.cuda,
        "trees": tree_hashes(),
        "parts": results,
    }
    short = next((word.lower() for word in device.split() if word[0] in "AHBL" and word[1:2].isdigit()), "gpu")
    out = options.out or Path(f"docs/results/{short}{f'x{gpus}' if gpus > 1 else ''}_proof.json")
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(f"{'ok' if record['ok'] else 'FAILED'}: {out}")
    return 0 if record["ok"] else 1


def report(name: str, part: Callable[[Session], dict[str, Any]], session: Session) -> dict[str, Any]:
    """What a part found, or how it failed; said at once."""
    start = time.monotonic()
    try:
        result = {"name": name, "ok": True, **part(session)}
    except Exception as error:
        result = {"name": name, "ok": False, "error": f"{type(error).__name__}: {error}"[-4000:]}
    result["seconds"] = math.ceil(time.monotonic() - start)
    print(f"{'ok' if result['ok'] else 'FAILED':<7}{name} ({result['seconds']} s)", flush=True)
    if not result["ok"]:
        print(result["error"], flush=True)
    return result


if __name__ == "__main__":
    sys.exit(main())
