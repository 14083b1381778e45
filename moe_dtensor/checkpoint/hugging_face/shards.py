"""A folder of shards as one mapping from name to tensor, opened lazily through its index."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from moe_dtensor.checkpoint.hugging_face.mxfp4 import BLOCKS, SCALES, packed_tensors, read_packed
from moe_dtensor.checkpoint.hugging_face.safetensors_file import DTYPES, Entry, SafetensorsFile
from moe_dtensor.config.errors import ConfigError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"


class Shards:
    """The tensors of a Hugging Face folder.

    Raises:
        ConfigError: no weights, a shard that the index names is missing or cut short, an index entry without a tensor,
            or tensors that no index entry names.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self._open: dict[str, SafetensorsFile] = {}
        self.file_of = self._index()
        found: dict[str, str] = {}
        for file in sorted(set(self.file_of.values())):
            found |= dict.fromkeys(self._shard(file).entries, file)
        ghosts = [name for name in self.file_of if found.get(name) != self.file_of[name]]
        if ghosts:
            raise ConfigError(
                f"{self.folder / INDEX} names {_some(ghosts)} in {self.file_of[ghosts[0]]}, which has no such tensor.",
                "Fetch index and shards again; they are not of one model.",
            )
        self.file_of = found
        self.packed = packed_tensors({name: self._shard(file).entries[name] for name, file in found.items()})
        """Experts in MXFP4, read as the numbers that they stand for."""

    def _index(self) -> dict[str, str]:
        if (self.folder / INDEX).is_file():
            try:
                return dict(json.loads((self.folder / INDEX).read_text(encoding="utf-8"))["weight_map"])
            except (ValueError, KeyError, TypeError):
                raise ConfigError(f"{self.folder / INDEX} is no index of shards.", "Fetch the file again.") from None
        if (self.folder / SINGLE).is_file():
            return dict.fromkeys(self._shard(SINGLE).entries, SINGLE)
        others = sorted(p.name for p in self.folder.glob("*.bin"))
        told = f" ({others[0]} is a pickle, which is not read)" if others else ""
        raise ConfigError(
            f"{self.folder} has neither {INDEX} nor {SINGLE}{told}.", "Give a folder with .safetensors weights."
        )

    def _shard(self, file: str) -> SafetensorsFile:
        if file not in self._open:
            if not (self.folder / file).is_file():
                raise ConfigError(
                    f"{self.folder / INDEX} names {file}, which is not there.", "Fetch the missing shard."
                )
            self._open[file] = SafetensorsFile(self.folder / file)
        return self._open[file]

    def __contains__(self, name: str) -> bool:
        return name in self.file_of or name in self.packed

    def names(self) -> list[str]:
        """Of all tensors; packed ones without their parts."""
        parts = {base + part for base in self.packed for part in (BLOCKS, SCALES)}
        return [name for name in self.file_of if name not in parts] + list(self.packed)

    def entry(self, name: str) -> Entry:
        """Shape and dtype."""
        if name in self.packed:
            return self.packed[name]
        return self._shard(self.file_of[name]).entries[name]

    def read(self, name: str, ranges: Sequence[tuple[int, int]] | None = None) -> Tensor:
        """A tensor or a part of it."""
        if name in self.packed:
            return read_packed(name, self.packed[name], ranges, self.read)
        return self._shard(self.file_of[name]).read(name, ranges)

    def refuse_quantized(self) -> None:
        """Raise for weights that are codes, not numbers: FP8 and other packed types, but for experts in MXFP4."""
        packed = [n for n in self.names() if n.endswith(("_blocks", "_scales", "weight_scale_inv", "weight_scale"))]
        odd = [n for n in self.names() if self.entry(n).dtype not in DTYPES or self.entry(n).dtype == "U8"]
        kind = "MXFP4" if any(n.endswith("_blocks") for n in packed) else "quantised"
        if odd:
            kind = "FP8" if self.entry(odd[0]).dtype.startswith("F8") else kind
        if packed or odd:
            name = (odd or packed)[0]
            raise ConfigError(
                f"{self.folder} holds {kind} weights ({name}, {self.entry(name).dtype}); they are not read as numbers.",
                "Dequantise the folder to bfloat16 first.",
            )


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more


def some(names: Sequence[str]) -> str:
    """The first three names and how many more."""
    return _some(names)
