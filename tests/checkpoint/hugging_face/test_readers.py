"""What is exported is read whole by transformers 5 and 4, which then write the tokens that we do."""

from __future__ import annotations

import json
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest
import torch

from moe_dtensor.__main__ import main
from moe_dtensor.checkpoint.hugging_face.convert import config_only
from moe_dtensor.checkpoint.hugging_face.source import HuggingFaceSource, whole
from moe_dtensor.config.load import load
from moe_dtensor.model.balance_state import BalanceState
from moe_dtensor.model.transformer import Transformer
from tests.checkpoint.hugging_face import tiny_models

PROMPT = [5, 77, 130, 8]
READER = """
import json, sys, torch, transformers
transformers.utils.logging.set_verbosity_error()
for folder in sys.argv[1:]:
    model, told = transformers.AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    model.eval()
    tokens = torch.tensor([PROMPT])
    logits = model(tokens).logits[0, -1].tolist()
    more = model.generate(tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=20, do_sample=False)
    keys = sorted(told["missing_keys"]) + sorted(told["unexpected_keys"])
    print(json.dumps([keys, logits, more[0].tolist()]))
"""
CLASSES = "from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES as names; print(*names)"
# Its class leaves out of the scores what yarn's mscale_all_dim asks for; transformers 5 has it.
WRONG_IN_OLD = ("deepseek_v2",)


def own_answer(folder: Path) -> tuple[torch.Tensor, list[int]]:
    """Our logits after the prompt, and 20 more tokens, each the likeliest."""
    source = HuggingFaceSource(folder)
    model = Transformer(source.own_config, range(source.own_config.model.num_layers)).eval()
    BalanceState(source.own_config, [model], torch.device("cpu"))
    with torch.no_grad():
        for name, param in model.named_parameters():
            source.read(name, whole(param.shape), param)
        for layer in model.moe_layers:
            bias = model.get_submodule(f"layers.{layer}.moe.router").bias
            source.read(f"layers.{layer}.moe.router.bias", [(0, len(bias))], bias)
        tokens = list(PROMPT)
        answers = []
        for _ in range(20):
            positions = torch.arange(len(tokens))[None]
            answers.append(model(torch.tensor([tokens]), positions_BS=positions)[0, -1])
            tokens.append(int(answers[-1].argmax()))
    return answers[0], tokens


def exported(case: str, tmp_path: Path) -> Path:
    folder = tiny_models.save_model(case, tmp_path / "hf")
    out = tmp_path / case.replace(" ", "_")
    kind = tiny_models.CASES[case][0]
    native = ("--from", "hf", "--to", "native", "--input", f"{folder}", "--output", f"{tmp_path}/native")
    back = ("--from", "native", "--to", "hf", "--input", f"{tmp_path}/native", "--output", f"{out}")
    assert main(["convert", *native]) == 0
    assert main(["convert", *back, "--architecture", kind]) == 0
    return out


def read(python: str, folders: list[Path]) -> list[tuple[list[str], list[float], list[int]]]:
    code = READER.replace("PROMPT", str(PROMPT))
    result = subprocess.run([python, "-c", code, *map(str, folders)], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-2000:]
    return [tuple(json.loads(line)) for line in result.stdout.splitlines()]  # type: ignore[misc]


def check(folders: list[Path], python: str) -> None:
    for folder, (unmatched, logits, tokens) in zip(folders, read(python, folders), strict=True):
        own_logits, own_tokens = own_answer(folder)
        assert unmatched == [], folder.name
        torch.testing.assert_close(torch.tensor(logits), own_logits, rtol=0, atol=2e-5)
        assert tokens == own_tokens, folder.name


def test_transformers_reads_what_is_exported(tmp_path: Path) -> None:
    """FlexOlmo's class took a padding token of its own, beyond the vocabulary, where config.json named none."""
    folders = []
    for case in ("qwen3_moe dense block, tied", "ernie4_5_moe", "mellum", "flex_olmo"):
        (tmp_path / case).mkdir()
        folders.append(exported(case, tmp_path / case))
    check(folders, sys.executable)


@pytest.mark.full
def test_both_versions_of_transformers_read_every_family(tmp_path: Path) -> None:
    """transformers 4.57.6 in an environment of its own, with this one's torch behind it."""
    folders = {}
    for case in tiny_models.CASES:
        (tmp_path / case).mkdir()
        folders[case] = exported(case, tmp_path / case)
    check(list(folders.values()), sys.executable)
    venv.create(tmp_path / "old", with_pip=True)
    python = str(tmp_path / "old" / "bin" / "python")
    subprocess.run([python, "-m", "pip", "install", "-q", "transformers==4.57.6"], check=True)
    site = subprocess.run(
        [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], capture_output=True, text=True
    ).stdout.strip()
    (Path(site) / "behind.pth").write_text(sysconfig.get_path("purelib"))
    classes = subprocess.run([python, "-c", CLASSES], capture_output=True, text=True, check=True).stdout.split()
    old = [case for case in folders if case.split()[0] in classes and case not in WRONG_IN_OLD]
    assert len({case.split()[0] for case in old}) == 23
    check([folders[case] for case in old], python)


@pytest.mark.full
def test_every_mesh_leaves_the_same_bits(tmp_path: Path) -> None:
    """A run of one step that changes nothing gives back what it started from."""
    from safetensors.torch import load_file

    folder = tiny_models.save_model("dots1 groups", tmp_path / "hf")
    config_only(folder, tmp_path / "own.toml")
    assert load(tmp_path / "own.toml").checkpoint.initial == str(folder)
    before = load_file(folder / "model.safetensors")
    for dp, pp, tp in ((1, 1, 1), (1, 1, 4), (2, 2, 2)):
        run = tmp_path / f"run{dp}{pp}{tp}"
        keys = {
            "run.folder": run,
            "mesh.dp": dp,
            "mesh.pp": pp,
            "mesh.tp": tp,
            "training.steps": 1,
            "training.seq_len": 16,
            "training.global_batch_size": 8,
            "training.microbatch_size": 1,
            "data.corpus": "random",
            "data.tokenizer": tmp_path / "tokenizer",
            "optimizer.lr": 0,
            "checkpoint.export_hf": "true",
        }
        words = [word for key, value in keys.items() for word in (f"--{key}", str(value))]
        where = ["--nproc_per_node", f"{dp * pp * tp}", "--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0"]
        start = ["torchrun", *where, "-m", "moe_dtensor", "train", "--config", f"{tmp_path}/own.toml"]
        write_tokenizer(tmp_path / "tokenizer")
        subprocess.run([*start, *words], check=True)
        after = load_file(run / "hugging_face" / "model.safetensors")
        assert set(after) == set(before)
        assert all(torch.equal(after[name], value) for name, value in before.items())


def write_tokenizer(folder: Path) -> None:
    """Of 131 letters, the last of which ends a text."""
    from tokenizers import Tokenizer, models

    folder.mkdir(exist_ok=True)
    letters = {chr(0x4E00 + i): i for i in range(130)} | {"<|endoftext|>": 130}
    Tokenizer(models.BPE(vocab=letters, merges=[])).save(str(folder / "tokenizer.json"))
