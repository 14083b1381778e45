"""Multi-token prediction in the published layout: a block beyond the last, there and back, and what it computes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from moe_dtensor.__main__ import main
from moe_dtensor.checkpoint.hugging_face.source import HuggingFaceSource, same_function_problems, whole
from moe_dtensor.config.load import override
from moe_dtensor.model.transformer import Transformer
from tests.checkpoint.hugging_face import tiny_models

BLOCK = "model.layers.3."


def published(case: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, object]:
    """A folder of three blocks and one of multi-token prediction, and transformers' model of all four."""
    monkeypatch.setitem(tiny_models.SIZES, "num_hidden_layers", 4)
    model = tiny_models.build_model(case)
    model.save_pretrained(folder)
    generator = torch.Generator().manual_seed(1)
    tensors = load_file(folder / "model.safetensors")
    width = tiny_models.SIZES["hidden_size"]
    for name in ("enorm", "hnorm", "shared_head.norm"):
        tensors[f"{BLOCK}{name}.weight"] = 1 + torch.randn(width, generator=generator) / 4
    tensors[f"{BLOCK}eh_proj.weight"] = torch.randn(width, 2 * width, generator=generator) / width
    tensors[f"{BLOCK}embed_tokens.weight"] = tensors["model.embed_tokens.weight"].clone()
    tensors[f"{BLOCK}shared_head.head.weight"] = tensors["lm_head.weight"].clone()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    change_config(folder, num_hidden_layers=3, num_nextn_predict_layers=1)
    return folder, model


def change_config(folder: Path, **keys: object) -> None:
    path = folder / "config.json"
    content = json.loads(path.read_text()) | keys
    if "mlp_layer_types" in content:
        content["mlp_layer_types"] = content["mlp_layer_types"][:3]
    path.write_text(json.dumps(content))


def convert(way: str, source: Path, output: Path, *more: str) -> int:
    start, end = way.split(">")
    return main(["convert", "--from", start, "--to", end, "--input", str(source), "--output", str(output), *more])


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "case", ["deepseek_v3", *(pytest.param(c, marks=pytest.mark.full) for c in ("glm4_moe plain", "glm4_moe_lite"))]
)
def test_there_and_back_is_the_same_bits_and_the_block_computes_what_its_parts_do(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, theirs = published(case, tmp_path / "hf", monkeypatch)
    assert convert("hf>native", folder, tmp_path / "native") == 0
    kind = tiny_models.CASES[case][0]
    assert convert("native>hf", tmp_path / "native", tmp_path / "back", "--architecture", kind) == 0
    before, after = (load_file(path / "model.safetensors") for path in (folder, tmp_path / "back"))
    assert set(after) == set(before)
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert json.loads((tmp_path / "back" / "config.json").read_text())["num_nextn_predict_layers"] == 1

    source = HuggingFaceSource(folder)
    assert source.config.model.mtp_depth == 1
    ours = Transformer(source.config, range(4)).double().train()
    with torch.no_grad():
        for name, target in [*ours.named_parameters(), *ours.named_buffers()]:
            if name in source.shapes:
                source.read(name, whole(target.shape), target)
        for i in (1, 2, 3):
            source.read(f"layers.{i}.moe.router.bias", [(0, 8)], ours.layers[str(i)].moe.router.bias)
    tokens = torch.randint(0, 131, (2, 12), generator=torch.Generator().manual_seed(2))
    labels = torch.cat([tokens[:, 1:], torch.full((2, 1), -100)], dim=1)
    ours(tokens, labels)
    loss_K = ours.take_mtp_loss()
    assert loss_K is not None
    assert float(loss_K[0]) == pytest.approx(expected_loss(theirs, before, tokens), rel=1e-6)


@torch.no_grad()
def expected_loss(theirs: object, tensors: dict[str, torch.Tensor], tokens: torch.Tensor) -> float:
    """Of the second next tokens, by transformers' modules put together as the published description says."""
    model = theirs.double().model  # type: ignore[attr-defined]
    model.config._attn_implementation = model.config._experts_implementation = "eager"

    def normed(name: str, x: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(x, x.shape[-1:], tensors[name].double(), model.config.rms_norm_eps)

    length = tokens.shape[1]
    mask = torch.full((length, length), -torch.inf, dtype=torch.float64).triu(1)[None, None]
    positions = torch.arange(length)[None]
    embedded = model.embed_tokens(tokens)
    around = {
        "attention_mask": mask,
        "position_ids": positions,
        "position_embeddings": model.rotary_emb(embedded, positions),
    }

    def run(block: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
        y = block(x, **around)
        return y[0] if isinstance(y, tuple) else y

    stream = embedded
    for block in model.layers[:3]:
        stream = run(block, stream)
    stream = model.norm(stream)
    ahead = torch.cat([embedded[:, 1:], embedded[:, -1:]], dim=1)
    joined = torch.cat([normed(f"{BLOCK}enorm.weight", ahead), normed(f"{BLOCK}hnorm.weight", stream)], dim=-1)
    out = run(model.layers[3], joined @ tensors[f"{BLOCK}eh_proj.weight"].double().T)
    logits = normed(f"{BLOCK}shared_head.norm.weight", out) @ tensors["lm_head.weight"].double().T
    return float(F.cross_entropy(logits[:, :-2].flatten(0, 1), tokens[:, 2:].flatten(), reduction="sum"))


@pytest.mark.filterwarnings("ignore")
def test_it_may_be_absent_left_out_and_is_never_another_head(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, _ = published("deepseek_v3", tmp_path / "hf", monkeypatch)
    source = HuggingFaceSource(folder)
    without = override(source.written_config, {"model.mtp_depth": 0})
    assert same_function_problems(without, source.own_config) == []
    assert same_function_problems(source.own_config, without) == ["model.mtp_depth = 0 there, 1 here"]

    tensors = load_file(folder / "model.safetensors")
    path = folder / "model.safetensors"
    held = {name: value for name, value in tensors.items() if not name.startswith(BLOCK)}
    save_file(held, path, {"format": "pt"})
    assert HuggingFaceSource(folder).config.model.mtp_depth == 0

    save_file({name: value for name, value in tensors.items() if "eh_proj" not in name}, path, {"format": "pt"})
    assert convert("hf>native", folder, tmp_path / "native") == 2
    assert f"lacks {BLOCK}eh_proj.weight" in capsys.readouterr().err

    head = f"{BLOCK}shared_head.head.weight"
    save_file(tensors | {head: tensors[head] + 1}, path, {"format": "pt"})
    assert convert("hf>native", folder, tmp_path / "native") == 2
    assert f"{head} is no copy of lm_head.weight" in capsys.readouterr().err
    assert not (tmp_path / "native").exists()


def test_what_has_no_place_for_it_is_exported_without_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from moe_dtensor.checkpoint.hugging_face.convert import config_text
    from moe_dtensor.checkpoint.native import write_native
    from moe_dtensor.config.load import dump_changes
    from moe_dtensor.config.resolve import resolve

    folder = tiny_models.save_model("mixtral", tmp_path / "hf")
    source = HuggingFaceSource(folder)
    assert "mixtral" in config_text(source.written_config, source)
    config = override(source.written_config, {"model.mtp_depth": 1, "training.seq_len": 16})
    model = Transformer(resolve(config, 1), range(4))
    values = {name: torch.randn(value.shape) for name, value in model.named_parameters()}
    native = tmp_path / "native"
    native.mkdir()
    (native / "config.toml").write_text(dump_changes(config))
    balance = {"bias": torch.zeros(4, 6), "previous_load": torch.zeros(4, 6, dtype=torch.float64)}
    shapes = {name: (tuple(value.shape), value.dtype) for name, value in values.items()}
    write_native(native / config.checkpoint.folder, shapes, values.__getitem__, balance)
    assert convert("native>hf", native, tmp_path / "back") == 0
    assert "multi-token prediction is left out: mixtral" in capsys.readouterr().out
    assert set(load_file(tmp_path / "back" / "model.safetensors")) == set(load_file(folder / "model.safetensors"))
