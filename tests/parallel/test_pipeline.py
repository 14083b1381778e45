"""What a pipeline refuses."""

from __future__ import annotations

import pytest

from moe_dtensor.config.errors import ConfigError
from moe_dtensor.config.load import override
from moe_dtensor.config.resolve import SPLIT_BACKWARD
from moe_dtensor.config.schema import Config
from moe_dtensor.parallel.pipeline import check_torch


@pytest.mark.parametrize("schedule", SPLIT_BACKWARD)
def test_a_split_backward_needs_a_torch_that_can(schedule: str) -> None:
    config = override(Config(), {"mesh.pp": 2, "pipeline.schedule": schedule})
    with pytest.raises(ConfigError, match=rf"{schedule} .* this is torch 2\.11\.0\+cu130"):
        check_torch(config, "2.11.0+cu130")
    check_torch(config, "2.13.0+cpu")
    check_torch(override(config, {"pipeline.schedule": "1F1B"}), "2.11.0+cu130")
