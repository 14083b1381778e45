"""MXFP4 weights as numbers: 32 four-bit floats share a power of two (OCP Microscaling Formats 1.0, section 5).

E experts, R rows of a matrix, G groups of 32 of its columns.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from moe_dtensor.checkpoint.hugging_face.safetensors_file import Entry

MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
"""Of the codes 0 to 7 (E2M1); the fourth bit is the sign."""
BIAS = 127
"""Of the shared exponent (E8M0)."""
BLOCKS, SCALES = "_blocks", "_scales"
"""What gpt-oss adds to the name of a tensor for its codes ``(E, R, G, 16)``, two in a byte, and exponents
``(E, R, G)``."""

Read = Callable[[str, Sequence[tuple[int, int]]], Tensor]


def packed_tensors(entries: Mapping[str, Entry]) -> dict[str, Entry]:
    """What pairs of codes and exponents stand for, by name: matrices of experts in bfloat16, turned over,
    ``(E, 32 G, R)``, as gpt-oss has them unpacked."""
    found = {}
    for name, codes in entries.items():
        base = name.removesuffix(BLOCKS)
        exponents = entries.get(base + SCALES)
        if base == name or exponents is None or codes.dtype != "U8" or exponents.dtype != "U8":
            continue
        if codes.shape[-1] == 16 and codes.shape[:-1] == exponents.shape and len(codes.shape) == 4:
            experts, rows, groups, _ = codes.shape
            shape = (experts, 32 * groups, rows)
            found[base] = Entry("BF16", shape, 0, 2 * experts * 32 * groups * rows)
    return found


def read_packed(name: str, entry: Entry, ranges: Sequence[tuple[int, int]] | None, read: Read) -> Tensor:
    """A part of such a tensor, one expert at a time.

    Args:
        name: without what is added for codes and exponents.
        entry: see :func:`packed_tensors`.
        ranges: of experts, columns and rows; None: all.
        read: gives a part of a file tensor.
    """
    (first, last), (low, high), rows = ranges or [(0, size) for size in entry.shape]
    groups = (low // 32, -(-high // 32))
    out = torch.empty(last - first, high - low, rows[1] - rows[0], dtype=torch.bfloat16)
    for e in range(first, last):
        codes = read(name + BLOCKS, [(e, e + 1), rows, groups, (0, 16)])[0]
        exponents = read(name + SCALES, [(e, e + 1), rows, groups])[0]
        values_RC = unpack(codes, exponents)
        out[e - first].copy_(values_RC[:, low - 32 * groups[0] : high - 32 * groups[0]].T)
    return out


def unpack(codes_RGB: Tensor, exponent_RG: Tensor) -> Tensor:
    """``(R, G, 16)`` and ``(R, G)`` uint8 to ``(R, 32 G)`` float32; the lower half of a byte comes first."""
    table = torch.tensor([*MAGNITUDES, *(-value for value in MAGNITUDES)])
    halves = torch.stack([codes_RGB & 15, codes_RGB >> 4], dim=-1).flatten(-2)
    values = torch.ldexp(table[halves.long()], exponent_RG.int()[..., None] - BIAS)
    return values.flatten(-2)
