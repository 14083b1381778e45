"""The likeliest tokens of exported folders are those that transformers' generate takes, float64."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from moe_dtensor.generate.batch import Sampling, complete
from moe_dtensor.generate.load import find_source, load_model
from moe_dtensor.testing.ranks import run_on_ranks
from tests.checkpoint.hugging_face import tiny_models

PROMPTS = [[5, 9, 2, 77, 31, 8, 8, 1, 99, 40], [130, 4], [17, 3, 3, 60, 12]]
COUNT = 20
DEFAULT = ("olmoe", "deepseek_v3")
WIDE = {f"training.{key}": "float64" for key in ("dtype", "param_dtype", "reduce_dtype")}


def ours(folder: Path) -> tuple[list[list[int]], float]:
    model = load_model(find_source(folder, WIDE, 1), torch.device("cpu"))
    completions, error = complete(model, PROMPTS, COUNT, Sampling(), [], check=True)
    return [c.ids for c in completions], error


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize(
    "case", [c if c in DEFAULT else pytest.param(c, marks=pytest.mark.full) for c in tiny_models.CASES]
)
def test_greedy_tokens_are_those_of_transformers(case: str, tmp_path: Path) -> None:
    tiny_models.save_model(case, tmp_path)
    model = tiny_models.build_model(case).double()
    # Its grouped products take no float64.
    model.config._attn_implementation = model.config._experts_implementation = "eager"
    ((found, error),) = run_on_ranks(ours, 1, tmp_path)
    assert error < 1e-12
    for prompt, ids in zip(PROMPTS, found, strict=True):
        expected = model.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
            max_new_tokens=COUNT,
            do_sample=False,
        )[0, len(prompt) :]
        assert ids == expected.tolist(), prompt
