"""A run's stamp, the proof that its checkpoints and exported folder carry, and what no longer matches it."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from moe_dtensor.__main__ import main
from moe_dtensor.checkpoint import proof
from moe_dtensor.verify import stamp

from . import mutations_update

TINY = """
[model]
num_layers = 2
dim = 32
num_heads = 4
hidden_dim = 32
[moe]
num_experts = 4
top_k = 2
hidden_dim = 16
router = "topk"
normalize_gates = true
[data]
corpus = "files"
path = "{folder}/text.txt"
[training]
steps = 1
seq_len = 16
global_batch_size = 2
microbatch_size = 1
param_dtype = "float32"
[checkpoint]
export_hf = true
"""


@pytest.fixture(scope="module")
def stamped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with ``tiny.toml`` and ``run/``, stamped before its one step."""
    folder = tmp_path_factory.mktemp("stamped")
    (folder / "tiny.toml").write_text(TINY.format(folder=folder))
    (folder / "text.txt").write_text("\n".join(f"{i} times {i} is {i * i}" for i in range(400)))
    words = ["--config", str(folder / "tiny.toml"), "--run.folder", str(folder / "run")]
    assert main(["verify", *words, "--meshes", "1x1x1", "--stamp"]) == 0
    done = subprocess.run([sys.executable, "-m", "moe_dtensor", "train", *words], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture
def run(stamped: Path, tmp_path: Path) -> Path:
    """A copy of the run, to break."""
    shutil.copytree(stamped / "run", tmp_path / "run")
    return tmp_path / "run"


def check(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, str]:
    status = main(["check", "--checkpoint", *map(str, words)])
    return status, capsys.readouterr().out


def change(path: Path, **values: Any) -> None:
    """Change what a proof says."""
    content = json.loads(path.read_text())
    for key, value in values.items():
        part, _, name = key.partition("__")
        content[part][name] = value
    path.write_text(json.dumps(content))


def test_a_checkpoint_and_an_exported_folder_carry_the_proof(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    step = run / "checkpoints" / "step-00000001"
    for place in (run, run / "checkpoints", step, run / "hugging_face"):
        status, printed = check(capsys, place)
        assert status == 0, printed
        assert "1 of 1 meshes and schedules agree with the oracle in float64" in printed
        assert "expert_load_max_over_mean" in printed
        assert "the proof holds" in printed
    saved = json.loads((step / "proof.json").read_text())["saved"]
    assert saved["data"] == json.loads((run / "run.json").read_text())["data"]
    assert len(saved["routing"]["expert_load_cv"]) == 2


def test_code_that_changed_is_named_by_its_room(
    run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    changed = proof.code_hashes() | {"kernels": "0"}
    monkeypatch.setattr(stamp, "code_hashes", lambda: changed)
    status, printed = check(capsys, run)
    assert status == 1
    assert "code: no longer matches: kernels saved, another here" in printed


def test_code_that_changed_between_proof_and_training_is_named(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content = json.loads((run / "hugging_face" / "proof.json").read_text())
    change(run / "hugging_face" / "proof.json", stamp__code=content["stamp"]["code"] | {"train": "0"})
    status, printed = check(capsys, run / "hugging_face")
    assert status == 1
    assert "code: no longer matches: train proven, another saved" in printed


def test_a_config_that_changed_is_named_by_its_keys(
    run: Path, stamped: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with (run / "config.toml").open("r+") as file:
        text = file.read().replace("beta2 = 0.95", "beta2 = 0.5")
        file.seek(0)
        file.write(text)
    status, printed = check(capsys, run)
    assert status == 1
    assert "config: no longer matches: optimizer.beta2 = 0.95 saved, optimizer.beta2 = 0.5 here" in printed
    given = ["--config", stamped / "tiny.toml"]
    assert check(capsys, run, *given)[0] == 0
    assert check(capsys, run, *given, "--training.steps", "9", "--optimizer.lr", "1e-5")[0] == 0
    status, printed = check(capsys, run, *given, "--moe.top_k", "1", "--moe.normalize_gates", "false")
    assert status == 1
    assert "moe.top_k = 2 saved, moe.top_k = 1 here" in printed


def test_data_that_changed_are_told_and_data_that_are_gone_are_not_compared(
    run: Path, stamped: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "other.txt"
    other.write_text("something else\n" * 400)
    given = ["--config", stamped / "tiny.toml", "--data.path"]
    status, printed = check(capsys, run, *given, other)
    assert status == 1
    assert "data: no longer matches" in printed
    status, printed = check(capsys, run, *given, tmp_path / "gone.txt")
    assert status == 0
    assert "not compared" in printed


def test_another_torch_is_told(run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stamp, "torch_version", lambda: "9.9")
    status, printed = check(capsys, run)
    assert status == 1
    assert f"torch: no longer matches: {proof.torch_version()} saved, 9.9 here" in printed


def test_a_mesh_is_proven_by_one_that_splits_the_same_axes(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = run / "hugging_face" / "proof.json"
    change(file, stamp__layouts=[["2x1x2", "none"], ["1x2x1", "1F1B"]], saved__mesh="16x1x4")
    status, printed = check(capsys, run / "hugging_face")
    assert status == 0
    assert "mesh: 16x1x4 splits what 2x1x2 does, which was proven" in printed
    change(file, saved__mesh="1x4x1", saved__schedule="GPipe")
    status, printed = check(capsys, run / "hugging_face")
    assert status == 1
    assert "mesh: 1x4x1 GPipe was not proven" in printed


def test_files_that_changed_are_told(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    change(run / "checkpoints" / "step-00000001" / "proof.json", stamp__ok=False)
    status, printed = check(capsys, run)
    assert status == 1
    assert "files: proof.json has" in printed


def test_no_stamp_no_proof_and_a_failed_verdict_all_end_with_1(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    exported = run / "hugging_face"
    content = json.loads((exported / "proof.json").read_text())
    failed = content["stamp"] | {"ok": False, "agree": 0, "differ": ["1x1x1 none: loss loss"]}
    (exported / "proof.json").write_text(json.dumps(content | {"stamp": failed}))
    status, printed = check(capsys, exported)
    assert (status, "0 of 1 meshes" in printed, "loss loss" in printed) == (1, True, True)
    (exported / "proof.json").write_text(json.dumps(content | {"stamp": None}))
    status, printed = check(capsys, exported)
    assert (status, "the run had no stamp" in printed) == (1, True)
    (exported / "proof.json").unlink()
    status, printed = check(capsys, exported)
    assert (status, "proof: none" in printed) == (1, True)


def test_what_is_no_checkpoint_ends_with_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert check(capsys, tmp_path / "none")[0] == 2
    assert check(capsys, tmp_path)[0] == 2
    assert main(["verify", "--stamp", str(tmp_path)]) == 2
    assert "holds no config.toml" in capsys.readouterr().err


def test_a_bad_verdict_is_stamped_on_the_run_that_is_named(run: Path) -> None:
    with mutations_update.gradient_ascent():
        assert main(["verify", "--stamp", str(run), "--meshes", "1x1x1"]) == 1
    stamp = json.loads((run / "stamp.json").read_text())
    assert (stamp["ok"], stamp["agree"], stamp["of"], stamp["layouts"]) == (False, 0, 1, [])
    assert stamp["differ"][0].startswith("1x1x1 none: moment layers.")
