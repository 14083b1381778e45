"""The tables of docs/cluster.md say what ``plan`` does."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest

from moe_dtensor.config.load import load, override
from moe_dtensor.config.resolve import resolve
from moe_dtensor.config.schema import Config
from moe_dtensor.estimate.memory import fullest_rank
from moe_dtensor.estimate.speed import bubble
from moe_dtensor.estimate.traffic import traffic
from moe_dtensor.verbs.plan import with_vocabulary

ROOT = Path(__file__).resolve().parents[2]


def rows(heading: str) -> list[list[str]]:
    """Cells of the table whose head begins so."""
    text = (ROOT / "docs/cluster.md").read_text(encoding="utf-8")
    table = text[text.index(heading) :].split("\n\n")[0].splitlines()[2:]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table]


def placed(gpus: str, name: str, mesh: str, flags: str) -> Config:
    """A row's config, resolved and checked against its number of GPUs."""
    dp, pp, tp = map(int, mesh.split("x"))
    assert dp * pp * tp == int(gpus)
    words = flags.strip("`").split()
    changes = dict(zip((word.removeprefix("--") for word in words[::2]), words[1::2], strict=True))
    config = with_vocabulary(override(load(ROOT / f"train_configs/{name.strip('`')}.toml"), changes))
    return resolve(replace(config, mesh=replace(config.mesh, dp=dp, pp=pp, tp=tp)), dp * pp * tp)


def numbers(cell: str) -> list[float]:
    return [float(x) for x in re.findall(r"\d+(?:\.\d+)?", cell)]


def near(found: float, told: float, cell: str) -> bool:
    """Whether a number is the one told, rounded as it is told."""
    digits = max((len(x) for x in re.findall(r"\.(\d+)", cell)), default=0)
    return abs(found - told) <= 0.51 * 10**-digits or (abs(found - told) <= 0.51 and told == round(told))


def sent(config: Config) -> list[float]:
    bytes_sent = traffic(config)
    return [x / 2**30 for x in (bytes_sent.dp, bytes_sent.pp, bytes_sent.tp, bytes_sent.dp_tp)]


@pytest.mark.parametrize("row", rows("| GPUs | config | mesh (dp x pp x tp)"), ids=lambda row: " ".join(row[:3]))
def test_meshes_by_number_of_gpus(row: list[str]) -> None:
    gpus, name, mesh, flags, memory, traffic_told, waits = row
    config = placed(gpus, name, mesh, flags)
    for told, skewed in zip(numbers(memory), (False, True), strict=False):
        assert near(fullest_rank(config, skewed)[1].peak / 2**30, told, memory), memory
    for told, found in zip(numbers(traffic_told), sent(config), strict=False):
        assert near(found, told, traffic_told), (traffic_told, sent(config))
    if numbers(waits):
        assert near(100 * bubble(config), numbers(waits)[0], waits)


@pytest.mark.parametrize(
    "row", rows("| GPUs | config | mesh | other flags | weights"), ids=lambda row: " ".join(row[:3])
)
def test_large_models_item_by_item(row: list[str]) -> None:
    gpus, name, mesh, flags, *items, peaks, traffic_told = row
    config = placed(gpus, name, mesh, flags)
    _, memory = fullest_rank(config)
    copies = memory.compute_copy + memory.expert_copy
    found = [memory.weights, memory.gradients, memory.moments, copies, memory.activations]
    for told, value in zip(items, found, strict=True):
        assert near(value / 2**30, float(told), told), (row, value / 2**30)
    for told_peak, skewed in zip(numbers(peaks), (False, True), strict=True):
        assert near(fullest_rank(config, skewed)[1].peak / 2**30, told_peak, peaks), peaks
    for told_sent, value in zip(numbers(traffic_told), sent(config), strict=True):
        assert near(value, told_sent, traffic_told), (traffic_told, sent(config))
