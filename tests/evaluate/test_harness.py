"""lm-eval's own model of transformers on the exported folder, and ours on the run: the same scores of three tasks."""

from __future__ import annotations

import json
import math
import os
import random
from pathlib import Path
from typing import Any

import pytest
import torch

from moe_dtensor.__main__ import main
from moe_dtensor.checkpoint.hugging_face.export import write_tokenizer
from moe_dtensor.evaluate.choices import accuracies, answer_questions, prepare_questions, read_questions
from moe_dtensor.evaluate.harness import build_lm, find_tasks
from moe_dtensor.evaluate.score import score
from moe_dtensor.evaluate.text import Encoder, prepare_text, read_text, sum_text
from moe_dtensor.generate.load import find_source, load_model, load_tokenizer, tokenizer_folder
from moe_dtensor.testing.ranks import run_on_ranks

lm_eval = pytest.importorskip("lm_eval")
pytestmark = pytest.mark.filterwarnings("default")  # of other libraries
LENGTH = 128  # that of a converted run
MESHES = {"1x1x1": (1, 1, "tp"), "2x1x2": (2, 2, "dp"), "1x1x4": (1, 4, "tp")}
TASK = """\
task: {name}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {file}
test_split: test
output_type: {kind}
doc_to_text: {text}
{more}
metric_list:
{metrics}
"""
TASKS = {
    "quiz": (
        "multiple_choice",
        "'{{context}}'",
        "doc_to_choice: choices\ndoc_to_target: answer",
        "acc acc_norm acc_bytes",
    ),
    "reading": ("loglikelihood_rolling", "''", "doc_to_target: '{{text}}'", "byte_perplexity bits_per_byte"),
    "last_word": ("loglikelihood", "'{{context}}'", "doc_to_target: '{{text}}'", "perplexity acc"),
    # One stops at a text, one when there are enough; of one the beginning does not fit.
    "answer": (
        "generate_until",
        "'{{context}}'",
        "doc_to_target: '{{text}}'\ngeneration_kwargs: {until: [e, q], max_gen_toks: 12, do_sample: false}",
        "exact_match",
    ),
}
Scores = dict[str, list[float | str]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Task files and their data; a model of transformers, taken in as ours (``run``) and given out again (``hf``)."""
    import transformers

    folder = tmp_path_factory.mktemp("lm_eval")
    words, draw = ["the", "token", "été", "routes", "数", "an", "expert,", "gate;", "naïve", "mesh?"], random.Random(0)

    def text(most: int) -> str:
        return " ".join(draw.choices(words, k=draw.randint(1, most)))

    def choices() -> list[str]:
        """Three unlike ones: of equal ones the last bit would choose."""
        return [" ".join(draw.sample(words, k)) for k in draw.sample(range(1, 4), 3)]

    data = {
        "quiz": [
            {"context": text(14) + draw.choice(["", ":", " "]), "choices": choices(), "answer": i % 3} for i in range(6)
        ],
        "reading": [{"text": text(40)} for _ in range(3)],
        "last_word": [{"context": "" if i == 0 else text(8), "text": draw.choice(words)} for i in range(4)],
        "answer": [{"context": context, "text": "?"} for context in ("an", "routes the", "mesh? été", "expert, " * 20)],
    }
    (folder / "tasks").mkdir()
    for name, (kind, of_text, more, metrics) in TASKS.items():
        file = folder / f"{name}.jsonl"
        file.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in data[name]))
        listed = "\n".join(f"  - metric: {metric}" for metric in metrics.split())
        filled = TASK.format(name=name, file=file, kind=kind, text=of_text, more=more, metrics=listed)
        (folder / "tasks" / f"{name}.yaml").write_text(filled)
    torch.manual_seed(0)
    config = transformers.OlmoeConfig(
        vocab_size=257,
        hidden_size=32,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_experts=4,
        num_experts_per_tok=2,
        max_position_embeddings=LENGTH,
        initializer_range=0.1,
        eos_token_id=256,
        bos_token_id=None,
        pad_token_id=None,
    )
    transformers.OlmoeForCausalLM(config).save_pretrained(folder / "given")
    write_tokenizer("bytes", 257, folder / "given")
    convert = ["convert", "--dtype", "float32", "--from"]
    assert main([*convert, "hf", "--to", "native", "--input", f"{folder}/given", "--output", f"{folder}/run"]) == 0
    assert main([*convert, "native", "--to", "hf", "--input", f"{folder}/run", "--output", f"{folder}/hf"]) == 0
    return folder


def numbers(results: dict[str, Any]) -> tuple[Scores, Scores]:
    """Log-likelihoods or answers by task, and its metrics."""
    answers = {name: [r[0] for s in found for r in s["resps"]] for name, found in results["samples"].items()}
    samples = {
        name: [a if isinstance(a, str) else float(a[0] if isinstance(a, list | tuple) else a) for a in of_task]
        for name, of_task in answers.items()
    }
    metrics = {
        name: [v for k, v in sorted(found.items()) if isinstance(v, float) and "stderr" not in k]
        for name, found in results["results"].items()
    }
    return samples, metrics


def evaluate(lm: Any, folder: Path) -> tuple[Scores, Scores]:
    manager = find_tasks(list(TASKS), folder / "tasks")
    return numbers(lm_eval.simple_evaluate(model=lm, tasks=list(TASKS), task_manager=manager, bootstrap_iters=0))


@pytest.fixture(scope="module")
def theirs(folder: Path) -> tuple[Scores, Scores]:
    from lm_eval.models.huggingface import HFLM

    return evaluate(HFLM(pretrained=str(folder / "hf"), device="cpu", dtype="float32", batch_size=4), folder)


def ours(folder: Path, name: str, mesh: str) -> tuple[tuple[Scores, Scores], dict[str, float], float]:
    """By lm-eval, and by our own reading of the same files."""
    dp, tp, experts = MESHES[mesh]
    keys = {"mesh.dp": dp, "mesh.tp": tp, "mesh.experts": experts, "training.param_dtype": "float32"}
    source = find_source(folder / name, keys, dp * tp)
    tokenizer, _ = load_tokenizer(source)
    model = load_model(source, torch.device("cpu"))
    encoder, length = Encoder(tokenizer, tokenizer_folder(source)), source.max_length
    questions = read_questions("quiz", folder / "quiz.jsonl")
    asked = prepare_questions(questions, encoder, length)
    answered = answer_questions(questions, asked, score(model, asked, 4))
    text = prepare_text(read_text("--data", str(folder / "reading.jsonl"), "text", 0), encoder, length, length)
    bits = sum_text(text, score(model, text.requests, 4)).bits_per_byte
    os.environ["LOCAL_RANK"] = "0"  # on others lm-eval gives nothing back
    return evaluate(build_lm(model, encoder, length, 5), folder), accuracies(answered), bits


@pytest.mark.parametrize(("name", "mesh"), [("run", "1x1x1"), ("run", "2x1x2"), ("hf", "1x1x4")])
def test_scores_are_those_of_lm_evals_own_model(folder: Path, theirs: tuple, name: str, mesh: str) -> None:
    dp, tp, _ = MESHES[mesh]
    samples, metrics = theirs
    assert max(len(text) for text in samples.values()) == 18
    for (found, values), accuracy, bits in run_on_ranks(ours, dp * tp, folder, name, mesh, timeout=300.0):
        for task in TASKS:
            assert found[task] == pytest.approx(samples[task], abs=1e-4), task
            assert values[task] == pytest.approx(metrics[task], rel=1e-4), task
        assert [accuracy[key] for key in ("acc", "acc_bytes", "acc_norm")] == metrics["quiz"]
        assert bits == pytest.approx(metrics["reading"][0], rel=1e-6)
        assert math.isfinite(bits)


def test_begin_tokens_are_lm_evals(tmp_path: Path) -> None:
    """A tokenizer that begins every text, one that names a begin token without doing so, and one told not to."""
    from lm_eval.models.huggingface import HFLM
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    from moe_dtensor.data.tokenizer import HuggingFaceTokenizer

    vocabulary = {"<s>": 0, "</s>": 1, "?": 2, "a": 3, "b": 4}
    for number, (begins, settings) in enumerate(
        [(True, {"bos_token": "<s>"}), (False, {"bos_token": "<s>"}), (False, {})]
    ):
        folder = tmp_path / str(number)
        folder.mkdir()
        library = Tokenizer(models.WordLevel(vocabulary, unk_token="?"))
        library.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        library.add_special_tokens(["<s>", "</s>"])
        if begins:
            library.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
        library.save(str(folder / "tokenizer.json"))
        named = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>", **settings}
        (folder / "tokenizer_config.json").write_text(json.dumps(named))
        import transformers

        lm = object.__new__(HFLM)
        lm.tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        lm.add_bos_token, lm.custom_prefix_token_id, lm.backend = None, None, "causal"
        encoder = Encoder(HuggingFaceTokenizer(str(folder)), folder)
        assert encoder.prefix_id == lm.prefix_token_id
        for text in ("a b", "<s> a", "b"):
            assert encoder(text) == lm.tok_encode(text)
        assert encoder.pair("a b ", " b a") == lm._encode_pair("a b ", " b a")
