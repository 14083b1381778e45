"""The table of families: transformers' modules against the oracle on random tiny models, as measured.

    python scripts/families_table.py --measure    # writes docs/results/families.json; needs the extra hf, minutes
    python scripts/families_table.py              # writes the table into README.md

Both from the repository's root.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import tempfile
import warnings
from pathlib import Path
from typing import Any

RESULT, PAGE = Path("docs/results/families.json"), Path("README.md")
BEGIN, END = "<!-- families: begin -->\n", "<!-- families: end -->\n"
MODELS = Path("tests/checkpoint/hugging_face/tiny_models.py")


def measure(only: list[str]) -> None:
    """The largest relative difference of logits and of a gradient, for every tiny model, in both dtypes."""
    import torch
    import transformers

    from moe_dtensor.checkpoint.hugging_face.source import HuggingFaceSource
    from moe_dtensor.verify.hugging_face import prove_folder

    warnings.filterwarnings("ignore")
    spec = importlib.util.spec_from_file_location("tiny_models", MODELS)
    assert spec
    assert spec.loader
    models: Any = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(models)
    result = json.loads(RESULT.read_text()) if only else {"models": {}}
    result |= {"torch": torch.__version__, "transformers": transformers.__version__}
    for case in only or models.CASES:
        with tempfile.TemporaryDirectory() as folder:
            source = HuggingFaceSource(models.save_model(case, Path(folder) / "hf"))
            found = {"model_type": models.CASES[case][0]}
            for verdict in prove_folder(source):
                if not verdict.ok:
                    raise SystemExit(f"{case}, {verdict.mesh}: {verdict.worst}")
                found[verdict.mesh] = {kind: float(f"{verdict.largest(kind):.1e}") for kind in ("logits", "gradient")}
        print(case, found, flush=True)
        result["models"][case] = found
    RESULT.write_text(json.dumps(result, indent=2) + "\n")


def table(result: dict[str, Any]) -> str:
    """Markdown: a line for each ``model_type``, with the largest of its models."""
    worst: dict[str, list[float]] = {}
    for found in result["models"].values():
        figures = [found[dtype][kind] for dtype in ("float32", "float64") for kind in ("logits", "gradient")]
        before = worst.setdefault(found["model_type"], figures)
        worst[found["model_type"]] = [max(pair) for pair in zip(before, figures, strict=True)]
    versions = f"transformers {result['transformers']}, torch {result['torch'].partition('+')[0]}"
    lines = [
        f"{versions}; largest relative difference:\n",
        "| `model_type` | logits, float32 | gradient, float32 | logits, float64 | gradient, float64 |",
        "|---|---|---|---|---|",
        *(f"| {name} | {' | '.join(f'{figure:.1e}' for figure in figures)} |" for name, figures in worst.items()),
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    """As the module says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--measure", nargs="*", metavar="MODEL", help="measure first: all, or those named anew")
    options = parser.parse_args()
    if options.measure is not None:
        measure(options.measure)
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    _, _, after = rest.partition(END)
    text = before + BEGIN + table(json.loads(RESULT.read_text())) + END + after
    PAGE.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
