"""gpt-oss's experts as published: four-bit codes and exponents are read as what transformers makes of them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from moe_dtensor.__main__ import main
from moe_dtensor.checkpoint.hugging_face.safetensors_files import unpack
from moe_dtensor.checkpoint.hugging_face.source import HuggingFaceSource, whole
from tests.checkpoint.hugging_face import tiny_models

WIDTH = 64


@pytest.mark.filterwarnings("ignore")
def test_codes_are_read_as_numbers_by_slices_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    monkeypatch.setitem(tiny_models.SIZES, "hidden_size", WIDTH)
    monkeypatch.setitem(tiny_models.CASES["gpt_oss"][1], "intermediate_size", WIDTH)
    plain, packed = tiny_models.save_model("gpt_oss", tmp_path / "plain"), tmp_path / "packed"
    tensors = {name: value.bfloat16() for name, value in load_file(plain / "model.safetensors").items()}
    generator = torch.Generator().manual_seed(0)
    codes: dict[str, torch.Tensor] = {}
    for name in [name for name in tensors if name.endswith(("gate_up_proj", "down_proj"))]:
        experts, columns, rows = tensors[name].shape
        shape = (experts, rows, columns // 32, 16)
        blocks = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
        scales = torch.randint(110, 140, shape[:-1], generator=generator, dtype=torch.uint8)
        codes |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
        tensors[name] = convert_moe_packed_tensors(blocks, scales, dtype=torch.bfloat16).contiguous()
        assert tensors[name].shape == (experts, columns, rows)
    packed.mkdir()
    config = json.loads((plain / "config.json").read_text()) | {"dtype": "bfloat16"}
    (plain / "config.json").write_text(json.dumps(config))
    quantized = {"quantization_config": {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}}
    (packed / "config.json").write_text(json.dumps(config | quantized))
    save_file(tensors, plain / "model.safetensors", {"format": "pt"})
    kept = {name: value for name, value in tensors.items() if f"{name}_blocks" not in codes}
    save_file(kept | codes, packed / "model.safetensors", {"format": "pt"})

    one, other = HuggingFaceSource(plain), HuggingFaceSource(packed)
    assert one.shapes == other.shapes
    for name, shape in one.shapes.items():
        for held in (whole(shape), [(size // 3, size) for size in shape]):
            values = [torch.empty([high - low for low, high in held], dtype=torch.bfloat16) for _ in range(2)]
            one.read(name, held, values[0])
            other.read(name, held, values[1])
            assert torch.equal(*values), name
    convert = ["convert", "--from", "hf", "--to", "native", "--input", str(packed), "--output", f"{tmp_path}/native"]
    assert main(convert) == 0
    back = [
        "convert",
        "--from",
        "native",
        "--to",
        "hf",
        "--input",
        f"{tmp_path}/native",
        "--output",
        f"{tmp_path}/back",
    ]
    assert main(back) == 0
    written = load_file(tmp_path / "back" / "model.safetensors")
    assert set(written) == set(tensors)
    assert all(torch.equal(written[name], value) for name, value in tensors.items())


def test_every_code() -> None:
    codes = torch.arange(0, 256, 17, dtype=torch.uint8)[None, None]  # 0x00, 0x11, ..., 0xff
    found = unpack(codes, torch.tensor([[128]], dtype=torch.uint8))[0]
    magnitudes = [0, 0.5, 1, 1.5, 2, 3, 4, 6]
    assert found[0::2].tolist() == found[1::2].tolist() == [2 * m for m in magnitudes] + [-2 * m for m in magnitudes]
