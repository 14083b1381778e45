"""A pipeline stage that reduces the gradients of each microbatch over dp, where torch's keeps whole ones for a step.

Loads the compiler with torch.distributed.pipelining: import it where there is a pipeline.
"""

from __future__ import annotations

from typing import Any

from torch.distributed.fsdp import FSDPModule
from torch.distributed.pipelining import PipelineStage
from torch.distributed.pipelining._backward import stage_backward

from moe_dtensor.parallel.fsdp import reduce_each, reduce_now


class ReducingStage(PipelineStage):
    """``fsdp.accumulate = sharded`` under a pipeline."""

    def backward_maybe_with_nosync(self, backward_type: str, bwd_kwargs: dict, last_backward: bool = False) -> Any:
        """One microbatch's backward pass, or half of it; what torch's returns.

        A whole one is reduced block by block as it goes. Halves run outside of FSDP's hooks: the gradients that the
        second leaves are reduced after it.
        """
        assert isinstance(self.submod, FSDPModule)
        if backward_type != "full":
            result = super().backward_maybe_with_nosync(backward_type, bwd_kwargs, last_backward=last_backward)
            if backward_type == "weight":
                reduce_now(self.submod, last_backward)
            return result
        reduce_each(self.submod, last_backward)
        return stage_backward(bwd_kwargs["stage_output"], bwd_kwargs["output_grads"], bwd_kwargs["input_values"]), None
