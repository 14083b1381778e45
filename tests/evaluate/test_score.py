"""Scores are those of one plain forward pass a request, on every mesh; every token of a text counts once."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from moe_dtensor.config.errors import ConfigError
from moe_dtensor.config.load import override
from moe_dtensor.config.resolve import resolve
from moe_dtensor.config.schema import Config
from moe_dtensor.data.tokenizer import ByteTokenizer
from moe_dtensor.evaluate.choices import (
    Question,
    accuracies,
    answer_questions,
    pair_request,
    prepare_questions,
    read_questions,
)
from moe_dtensor.evaluate.score import Request, Score, score
from moe_dtensor.evaluate.text import Encoder, prepare_text, sum_text, windows
from moe_dtensor.generate.batch import Model
from moe_dtensor.mesh import build_mesh
from moe_dtensor.model.balance_state import BalanceState
from moe_dtensor.parallel.apply import build_parts
from moe_dtensor.testing.ranks import run_on_ranks

CONFIG = override(
    Config(),
    {
        "model.num_layers": 2,
        "model.dim": 32,
        "model.num_heads": 4,
        "model.vocab_size": 61,  # 64 rows: three are padding, and at tp = 4 the last rank has them
        "model.init_std": 0.4,
        "model.window": 7,
        "model.mtp_depth": 1,
        "moe.num_experts": 4,
        "moe.hidden_dim": 16,
        "moe.router": "expert_choice",
        "moe.selection_bias": True,
        "mesh.sequence_parallel": False,
        "training.seq_len": 24,
        **{f"training.{key}": "float64" for key in ("dtype", "param_dtype", "reduce_dtype")},
    },
)


def requests() -> list[Request]:
    generator = torch.Generator().manual_seed(1)
    lengths = [2, 23, 5, 9, 9, 14, 3]
    tokens = [tuple(torch.randint(61, (n,), generator=generator).tolist()) for n in lengths]
    return [Request(t, max(1, len(t) // (1 + i % 3) - 1)) for i, t in enumerate(tokens)]


def build_model(mesh: tuple[int, int, int], experts: str) -> Model:
    dp, pp, tp = mesh
    placed = {"mesh.dp": dp, "mesh.pp": pp, "mesh.tp": tp, "mesh.experts": experts}
    config = resolve(override(CONFIG, placed), dp * pp * tp)
    device = torch.device("cpu")
    device_mesh = build_mesh(config, device)
    (part,) = build_parts(config, device_mesh, device)
    balance = BalanceState(config, [part], device)
    balance.bias_LE.copy_(torch.randn(balance.bias_LE.shape, generator=torch.Generator().manual_seed(0)) / 10)
    return Model(part.eval(), config, device_mesh, device)


def scores(mesh: tuple[int, int, int], experts: str, batch_size: int) -> tuple[list[Score], list[Score]]:
    """Ours, and on one rank those of a softmax over plain logits, request by request."""
    model = build_model(mesh, experts)
    asked = requests()
    # The greedy continuation of the first: it must be told from the others.
    plain = []
    if mesh == (1, 1, 1):
        for request in asked:
            with torch.no_grad():
                logits_SV = model.part(torch.tensor([request.tokens[:-1]]))[0, -request.scored :]
            target_S = torch.tensor(request.tokens[-request.scored :])
            ll = logits_SV.log_softmax(-1).gather(-1, target_S[:, None]).sum()
            plain.append(Score(float(ll), bool((logits_SV.argmax(-1) == target_S).all())))
    return score(model, asked, batch_size), plain


@pytest.fixture(scope="module")
def alone() -> list[Score]:
    ((found, plain),) = run_on_ranks(scores, 1, (1, 1, 1), "tp", 3)
    for ours, theirs in zip(found, plain, strict=True):
        assert ours.log_likelihood == pytest.approx(theirs.log_likelihood, rel=1e-12)
        assert ours.greedy == theirs.greedy
    return found


def test_one_rank_gives_a_plain_softmax(alone: list[Score]) -> None:
    assert len(alone) == 7
    assert len({s.log_likelihood for s in alone}) == 7


@pytest.mark.parametrize(("mesh", "experts"), [((1, 1, 4), "tp"), ((2, 1, 2), "dp"), ((4, 1, 1), "tp")])
def test_every_mesh_gives_the_same(alone: list[Score], mesh: tuple[int, int, int], experts: str) -> None:
    """Seven requests in batches of four: the last batch has fewer than dp ranks would share."""
    for found, _ in run_on_ranks(scores, 4, mesh, experts, 4):
        assert [s.greedy for s in found] == [s.greedy for s in alone]
        assert [s.log_likelihood for s in found] == pytest.approx([s.log_likelihood for s in alone], rel=1e-12)


def greedy_hits(mesh: tuple[int, int, int]) -> list[bool]:
    """Of continuations made of the likeliest tokens, the second with another last one."""
    model = build_model(mesh, "tp")
    ids = [3, 9, 27]
    for _ in range(4):
        with torch.no_grad():
            (logits_SV,) = torch.nn.functional.pad(model.part(torch.tensor([ids])), (0, 0))
        ids.append(int(logits_SV[-1].argmax()))
    return [s.greedy for s in score(model, [Request(tuple(ids), 4), Request((*ids[:-1], ids[-1] ^ 1), 4)], 2)]


def test_a_greedy_continuation_is_told_from_others() -> None:
    assert run_on_ranks(greedy_hits, 1, (1, 1, 1)) == [[True, False]]


@pytest.mark.parametrize("length", [0, 1, 7, 8, 9, 40])
@pytest.mark.parametrize(("max_length", "stride"), [(8, 8), (8, 3), (8, 1), (1, 1)])
def test_windows_score_every_token_once(length: int, max_length: int, stride: int) -> None:
    ids = list(range(100, 100 + length))
    found = list(windows(ids, 7, max_length, stride))
    assert [t for w in found for t in w.tokens[-w.scored :]] == ids
    assert all(len(w.tokens) - 1 <= max_length for w in found)
    assert all("".join(map(str, w.tokens)) in "".join(map(str, [7, *ids])) for w in found)
    # After the first, each token is foretold from as much as there is room for.
    assert all(len(w.tokens) - 1 == max_length for w in found[1:])


def test_bits_per_byte_and_perplexity() -> None:
    """A model that gives every token the probability 1/4, of a text in which a letter has two bytes."""
    encoder = Encoder(ByteTokenizer(), Path())
    text = prepare_text(["é", "abc"], encoder, 2, 2)
    assert (text.documents, text.bytes, text.tokens) == (2, 5, 5)
    assert text.requests[0].tokens == (256, *"é".encode())
    result = sum_text(text, [Score(-math.log(4) * r.scored, False) for r in text.requests])
    assert result.perplexity == pytest.approx(4)
    assert result.bits_per_byte == pytest.approx(2)


def test_measures_of_multiple_choice() -> None:
    """Each measure prefers another choice: it is the one with the highest sum, mean by token, by letter or by byte."""
    choices = ("aa", "bbbb", "ccc", "ééé")
    sums, tokens = (-3.0, -4.5, -4.2, -4.3), (2, 2, 10, 3)
    requests = [Request((0,) * (n + 1), n) for n in tokens]
    best = {}
    for answer in range(4):
        question = Question("", choices, answer)
        answered = answer_questions([question], requests, [Score(s, False) for s in sums])
        best |= {name: answer for name, share in accuracies(answered).items() if share == 1}
    assert best == {"acc": 0, "acc_per_token": 2, "acc_norm": 1, "acc_bytes": 3}


def test_pairs_are_cut_as_lm_eval_cuts_them() -> None:
    encoder = Encoder(ByteTokenizer(), Path())
    assert encoder.pair("ab ", "c") == ([97, 98], [32, 99])
    assert encoder.pair("", "c") == ([256], [99])
    (request,) = prepare_questions([Question("abcdef", ("xy", "z"), 0)], encoder, 4)[:1]
    assert (request.tokens, request.scored) == ((*b"ef xy",), 3)
    with pytest.raises(ConfigError, match="1 to 4"):
        pair_request([1], [2] * 5, 4)


def test_questions_are_read_or_refused(tmp_path: Path) -> None:
    file = tmp_path / "q.jsonl"
    good = {"context": "1 + 1 =", "choices": ["2", "3"], "answer": 0}
    also = {"query": "1 + 1 =", "choices": ["2", "3"], "gold": "3"}
    file.write_text("\n".join(map(json.dumps, (good, also))))
    assert [q.answer for q in read_questions("q", file)] == [0, 1]
    for wrong, told in (
        (good | {"answer": 2}, "from 0 to 1"),
        (good | {"choices": ["2"]}, "two or more"),
        ({"choices": ["2", "3"], "answer": 0}, "no context"),
    ):
        file.write_text("\n" + json.dumps(wrong))
        with pytest.raises(ConfigError, match=f"line 2.*{told}"):
            read_questions("q", file)
