"""A folder of 18,432 expert tensors, as many as Qwen3-30B-A3B has, 4 GB that are holes on the disk: read in little
memory, and what is wrong with it told in a sentence."""

from __future__ import annotations

import ctypes
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from moe_dtensor.checkpoint.weights import load_weights
from moe_dtensor.config.resolve import resolve
from moe_dtensor.generate.load import find_source
from moe_dtensor.mesh import build_mesh
from moe_dtensor.model.balance_state import BalanceState
from moe_dtensor.parallel.apply import build_parts
from moe_dtensor.testing.ranks import run_on_ranks

DIM, HIDDEN, LAYERS, EXPERTS, HEADS, VOCAB = 320, 336, 48, 128, 4, 512
CONFIG = {
    "model_type": "qwen3_moe",
    "architectures": ["Qwen3MoeForCausalLM"],
    "hidden_size": DIM,
    "intermediate_size": 64,
    "moe_intermediate_size": HIDDEN,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "num_experts": EXPERTS,
    "num_experts_per_tok": 8,
    "norm_topk_prob": True,
    "vocab_size": VOCAB,
    "dtype": "bfloat16",
}
SHARDS = 8
MEASURED = """
import resource, sys
from moe_dtensor.__main__ import main
status = main(sys.argv[1:])
print("PEAK", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
sys.exit(status)
"""


def tensors(layers: int) -> Iterator[tuple[str, list[int]]]:
    """Name and shape of every tensor."""
    yield "model.embed_tokens.weight", [VOCAB, DIM]
    for i in range(layers):
        block = f"model.layers.{i}."
        for name in ("input_layernorm", "post_attention_layernorm"):
            yield f"{block}{name}.weight", [DIM]
        for name, shape in (("q", [HEADS * 32, DIM]), ("k", [64, DIM]), ("v", [64, DIM]), ("o", [DIM, HEADS * 32])):
            yield f"{block}self_attn.{name}_proj.weight", shape
        for name in "qk":
            yield f"{block}self_attn.{name}_norm.weight", [32]
        yield f"{block}mlp.gate.weight", [EXPERTS, DIM]
        for e in range(EXPERTS):
            for name, shape in (("gate", [HIDDEN, DIM]), ("up", [HIDDEN, DIM]), ("down", [DIM, HIDDEN])):
                yield f"{block}mlp.experts.{e}.{name}_proj.weight", shape
    yield "model.norm.weight", [DIM]
    yield "lm_head.weight", [VOCAB, DIM]


def write(folder: Path, layers: int = LAYERS) -> int:
    """Shards whose tensors are holes; experts of a block straddle two of them. Their bytes."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG | {"num_hidden_layers": layers}))
    everything = list(tensors(layers))
    each, index, total = -(-len(everything) // SHARDS), {}, 0
    for number in range(SHARDS):
        file, at, header = f"model-{number + 1:05d}-of-{SHARDS:05d}.safetensors", 0, {}
        for name, shape in everything[number * each :][:each]:
            size = 2 * shape[0] * (shape[1] if len(shape) > 1 else 1)
            header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [at, at + size]}
            at, index[name] = at + size, file
        text = json.dumps(header).encode()
        with open(folder / file, "wb") as out:
            out.write(len(text).to_bytes(8, "little") + text)
            out.truncate(8 + len(text) + at)
        total += at
    content = {"metadata": {"total_size": total}, "weight_map": index}
    (folder / "model.safetensors.index.json").write_text(json.dumps(content))
    return total


def convert(source: Path, output: Path) -> subprocess.CompletedProcess[str]:
    words = ["convert", "--from", "hf", "--to", "native", "--input", str(source), "--output", str(output)]
    return subprocess.run([sys.executable, "-c", MEASURED, *words], capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("many") / "hf"
    assert sum(".experts." in name for name, _ in tensors(LAYERS)) == 18432
    assert write(path) > 3.9e9
    return path


@pytest.mark.full
def test_it_converts_in_little_memory(folder: Path, tmp_path: Path) -> None:
    result = convert(folder, tmp_path / "native")
    assert result.returncode == 0, result.stderr[-2000:]
    peak = int(re.search(r"PEAK (\d+)", result.stdout)[1])  # type: ignore[index]
    print(f"peak {peak / 1e9:.2f} GB")
    assert peak < 1.5e9
    assert "Reading" in result.stderr  # the bar
    assert (tmp_path / "native" / "config.toml").is_file()


M_MMAP_THRESHOLD = -3
"""Of glibc's ``malloc.h``."""


def memory(kind: str) -> int:
    """Bytes of this process that are resident now (``VmRSS``), or were at most (``VmHWM``)."""
    return int(re.search(rf"{kind}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024  # type: ignore[index]


def beyond_the_share(folder: Path) -> tuple[int, int]:
    """How much more memory than its share of the model a rank takes while it loads it, and its largest tensor."""
    # What is freed goes back to the system at once; else malloc would keep it, more or less as it happens to lie.
    ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 1 << 20)
    source = find_source(folder, {"training.param_dtype": "bfloat16"}, dist.get_world_size())
    config = resolve(source.config, dist.get_world_size())
    device = torch.device("cpu")
    (part,) = build_parts(config, build_mesh(config, device), device, trains=False)
    balance = BalanceState(config, [part], device)
    shards = [param.detach().to_local() for param in part.parameters()]  # type: ignore[attr-defined]
    for shard in shards:
        shard.fill_(1)  # memory that was never written is none yet
    Path("/proc/self/clear_refs").write_text("5")  # the most is counted from here
    before = memory("VmRSS")
    load_weights([part], balance, config, source.weights)
    assert not any(shard.any() for shard in shards)
    return memory("VmHWM") - before, max(shard.nbytes for shard in shards)


def test_a_rank_holds_one_tensor_beyond_its_share(tmp_path: Path) -> None:
    """Of four blocks on two ranks, 28 MB of 166 MB."""
    total = write(tmp_path / "hf", layers=4)
    for beyond, largest in run_on_ranks(beyond_the_share, 2, tmp_path / "hf"):
        assert largest < total / 12
        assert beyond < 1.25 * largest


def cut_short(folder: Path) -> None:
    file = max(folder.glob("*.safetensors"))
    os.truncate(file, file.stat().st_size - 100)


def change_json(file: str, change: Callable[[dict], object]) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        content = json.loads((folder / file).read_text())
        change(content)
        (folder / file).unlink()
        (folder / file).write_text(json.dumps(content))

    return spoil


def another_shape(folder: Path) -> None:
    """One expert's projection turned over, its bytes as many as before."""
    file = min(folder.glob("*.safetensors"))
    with open(file, "rb") as opened:
        length = opened.read(8)
        raw = length + opened.read(int.from_bytes(length, "little"))
    size = file.stat().st_size
    name = b'"model.layers.3.mlp.experts.7.up_proj.weight": {"dtype": "BF16", "shape": '
    changed = raw.replace(name + b"[336, 320]", name + b"[320, 336]")
    assert changed != raw
    file.unlink()
    with open(file, "wb") as out:
        out.write(changed)
        out.truncate(size)


FAULTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "a shard cut short": (cut_short, "is cut short"),
    "a shard missing": (lambda f: max(f.glob("*.safetensors")).unlink(), "which is not there"),
    "an index entry without a tensor": (
        change_json(
            "model.safetensors.index.json",
            lambda c: c["weight_map"].update({"model.layers.9.ghost": next(iter(c["weight_map"].values()))}),
        ),
        "model.layers.9.ghost",
    ),
    "another shape": (another_shape, "model.layers.3.mlp.experts.7.up_proj.weight has shape [320, 336]"),
    "another number of experts": (
        change_json("config.json", lambda c: c.update(num_experts=127)),
        "experts.127.gate_proj.weight",
    ),
}


@pytest.mark.full
@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_one_sentence_and_leaves_nothing(fault: str, folder: Path, tmp_path: Path) -> None:
    source = tmp_path / "hf"
    source.mkdir()
    for path in folder.iterdir():
        # Holes stay holes: the same file under another name, which a fault replaces or copies.
        if path.suffix == ".safetensors" and fault != "a shard cut short":
            os.link(path, source / path.name)
        else:
            subprocess.run(["cp", "--sparse=always", path, source / path.name], check=True)
    spoil, told = FAULTS[fault]
    spoil(source)
    result = convert(source, tmp_path / "native")
    assert result.returncode == 2, result.stderr[-2000:]
    assert told in result.stderr
    assert "Traceback" not in result.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf"]
