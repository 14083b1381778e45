"""Narrow gradients added up, and AdamW in one kernel, against torch (its AdamW with pieces widened around it)."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from moe_dtensor.kernels import update
from moe_dtensor.kernels.update import add_narrow, widened
from moe_dtensor.train import optimizer as module
from moe_dtensor.train.optimizer import REMAINDER, WideningAdamW
from moe_dtensor.train.rounding import Chance, round_by_chance, split


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(3,), (5, 4099), (2, 3, 4096)])
def test_sums_are_those_of_float32(shape, dtype, device, poisoned_memory, monkeypatch):
    monkeypatch.setattr(update, "WORTH", 1)
    torch.manual_seed(0)
    grads = [torch.randn(shape, device=device).to(dtype) for _ in range(3)]
    total = widened(grads[0], torch.float32)
    assert torch.equal(total, grads[0].float())
    for grad in grads[1:]:
        add_narrow(total, grad)
    assert torch.equal(total, grads[0].float() + grads[1].float() + grads[2].float())


def test_what_has_no_kernel(device):
    grad = torch.randn(6, 4, device=device).bfloat16().t()
    total = widened(grad, torch.float32)
    add_narrow(total, grad)
    assert torch.equal(total, 2 * grad.float())
    wide = torch.ones(3, device=device, dtype=torch.float64)
    add_narrow(wide, wide.clone())
    assert torch.equal(wide, torch.full_like(wide, 2))


KINDS = {
    "all in bfloat16": (torch.bfloat16, torch.bfloat16, "nearest"),
    "by chance": (torch.bfloat16, torch.float32, "stochastic"),
    "remainder": (torch.bfloat16, torch.bfloat16, "remainder"),
}


def make(kind, device, weight, lr, decay):
    dtype, state, rounding = KINDS[kind]
    parameter = nn.Parameter(weight.to(device, dtype))
    made = WideningAdamW([parameter], lr=lr, betas=(0.9, 0.95), eps=1e-8, weight_decay=decay, fused=True)
    made.state[parameter] = {
        "step": torch.zeros((), device=device),
        "exp_avg": torch.zeros_like(parameter, dtype=state).detach(),
        "exp_avg_sq": torch.zeros_like(parameter, dtype=state).detach(),
    }
    if rounding == "remainder":
        made.state[parameter][REMAINDER] = torch.zeros_like(parameter, dtype=torch.int16).detach()
    if rounding == "stochastic":
        made.chance = {parameter: Chance(parameter.detach(), "w", 0)}
    return parameter, made


@pytest.mark.parametrize("kind", KINDS)
def test_three_steps_one_of_them_skipped(kind, device, monkeypatch):
    torch.manual_seed(0)
    weight, grads = torch.randn(3, 1100), [torch.randn(3, 1100) for _ in range(3)]
    found = {}
    for kernel in (True, False):
        if not kernel:
            monkeypatch.setattr(module, "has_kernel", lambda tensors: False)
        parameter, made = make(kind, device, weight, 1e-2, 0.1)
        for number, grad in enumerate(grads):
            parameter.grad = grad.to(device, parameter.dtype)
            made.found_inf = torch.tensor(float(number == 1), device=device)
            if kernel or number != 1:
                made.step()
        found[kernel] = (
            parameter.detach().float(),
            *(made.state[parameter][k] for k in ("step", "exp_avg", "exp_avg_sq")),
        )
    near = 2e-2 if torch.bfloat16 in KINDS[kind][:2] else 1e-6
    assert found[True][1] == found[False][1] == 2
    torch.testing.assert_close(found[True][0], found[False][0], rtol=near, atol=near)
    for a, b in zip(found[True][2:], found[False][2:], strict=True):
        # Under the interpreter a cast to bfloat16 cuts digits off.
        narrow = {"rtol": 2e-2, "atol": 5e-3} if a.dtype == torch.bfloat16 else {"rtol": 1e-5, "atol": 1e-6}
        torch.testing.assert_close(a.float(), b.float(), **narrow)


class Operations(TorchDispatchMode):
    """Names of all that is called."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.name())
        return func(*args, **(kwargs or {}))


def test_no_number_is_brought_from_the_host(device):
    """It would wait for the device, once a parameter."""
    parameter, made = make("by chance", device, torch.randn(3, 1100), 1e-2, 0.1)
    parameter.grad = torch.ones_like(parameter)
    made.found_inf = torch.zeros((), device=device)
    with Operations() as called:
        made.step()
    assert called.names
    assert not [name for name in called.names if "lift" in name or "local_scalar" in name]


@pytest.mark.parametrize("kind", ["by chance", "remainder"])
def test_rounding_is_that_of_the_plain_code_to_the_bit(kind, device):
    """Without gradients the update is a product that float32 holds and bfloat16 does not."""
    weight = torch.randn(5, 3000, device=device).bfloat16()
    parameter, made = make(kind, device, weight, 0.375, 1.0)
    wide = 0.625 * weight.float().flatten()
    parameter.grad = torch.zeros_like(parameter)
    made.step()
    if kind == "remainder":
        narrow, rest = split(wide)
        assert torch.equal(made.state[parameter][REMAINDER].flatten(), rest)
    else:
        narrow = round_by_chance(wide, made.chance[parameter].draw(0, len(wide), torch.zeros((), device=device)))
    assert torch.equal(parameter.detach().flatten(), narrow)
    assert not torch.equal(narrow.float(), wide)
