"""What a training step's GPU time goes to, by kind of kernel, as a Markdown table.

python -m moe_dtensor bench train --config F --breakdown --json OUT
python scripts/kernels_by_kind.py OUT [--variant NAME]
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

KINDS = {
    "attention": ("sdpa", "flash", "cudnn::fusion"),
    "experts: products by QuACK": ("kernel_quack",),
    "experts: products of rows": ("rows_kernel", "make_tiles"),
    "experts: weight gradients": ("weight_kernel",),
    "experts: permute, unpermute": ("_permute", "_unpermute", "permute_kernel"),
    "routing": ("_iterate", "_finish", "_top_k", "_gates", "top_k_gates", "_place", "_count", "_statistics_kernel"),
    "experts: activation and its gradient": (
        *("_activation_backward", "_activate_rows"),
        *("activate_kernel", "backward_kernel"),
    ),
    "loss": ("_row_statistics", "_write_gradient"),
    "dense products": ("nvjet", "cutlass", "cublas", "gemm"),
    "norm and rotation of heads": ("_forward", "_backward", "_squares"),
    "optimizer, norm, clipping": ("FusedOptimizer", "multi_tensor_apply"),
    "adding gradients up": ("_accumulate", "CUDAFunctor_add<float>"),
    "collectives": ("nccl",),
    "copies": ("Memcpy", "Memset", "copy_kernel", "chunk_cat", "CatArray", "split_with_sizes_copy"),
    "norms and what the compiler fused": ("triton_",),
}
"""Kind, and parts of kernels' names; the first that fits counts. What the compiler fused bears the names of what it
is made of, and is told by how its own name begins."""


def kind_of(kernel: str) -> str:
    """The kind of a kernel, by its name."""
    if kernel.startswith("triton_"):
        return "norms and what the compiler fused"
    return next((kind for kind, parts in KINDS.items() if any(part in kernel for part in parts)), "other")


def table(kernels: dict[str, float]) -> str:
    """Milliseconds by kind, longest first, and their sum."""
    times: dict[str, float] = {}
    for name, time in kernels.items():
        times[kind_of(name)] = times.get(kind_of(name), 0.0) + time
    rows = [*sorted(times.items(), key=lambda item: -item[1]), ("sum", sum(times.values()))]
    lines = [f"| {kind} | {time:.1f} | {time / rows[-1][1]:.1%} |" for kind, time in rows]
    return "\n".join(["| kernels | ms | share |", "|---|---|---|", *lines])


def main() -> None:
    """Print the table of one variant."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path)
    parser.add_argument("--variant", help="its name, where the file has several")
    options = parser.parse_args()
    results = json.loads(options.results.read_text())
    records = results.get("variants", [results])
    record = next((r for r in records if options.variant in (None, r.get("name"))), None)
    if record is None or "breakdown" not in record:
        parser.error(f"{options.results} has no breakdown{f' of {options.variant}' if options.variant else ''}.")
    print(table(record["breakdown"][0]["kernels"]))


if __name__ == "__main__":
    main()
