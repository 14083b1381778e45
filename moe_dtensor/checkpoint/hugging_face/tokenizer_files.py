"""The files beside the weights that tell text from ids: copied, or written for the bytes tokenizer. Loads no torch."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

from moe_dtensor.data.tokenizer import ByteTokenizer, build_tokenizer

COPIED = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "vocab.txt",
    "tokenizer.model",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
)
END = "<|end|>"


def copy_tokenizer(source: Path, folder: Path) -> bool:
    """Copy what there is, unchanged; whether there is a tokenizer.json."""
    for name in COPIED:
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)
    return (folder / "tokenizer.json").is_file()


def write_tokenizer(name: str, vocab_size: int, folder: Path) -> dict[str, Any]:
    """The tokenizer files of ``data.tokenizer`` and a generation_config.json; none for a vocabulary smaller than bytes.

    Returns:
        What config.json says of special tokens: null where there is none, for a class may have defaults of its own.
    """
    if name == "bytes" and vocab_size < ByteTokenizer.vocab_size:
        return {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    if name == "bytes":
        _write_bytes(folder)
        tokens: dict[str, Any] = {"bos_token_id": None, "eos_token_id": ByteTokenizer.end_id, "pad_token_id": None}
    else:
        file = Path(os.path.expanduser(name))
        source = file if file.is_dir() else file.parent
        copy_tokenizer(source, folder)
        if file.is_file():
            shutil.copyfile(file, folder / "tokenizer.json")
        tokens = {"bos_token_id": None, "eos_token_id": build_tokenizer(name).end_id, "pad_token_id": None}
        _write_class(folder)
    generation = folder / "generation_config.json"
    if generation.is_file():
        stated = json.loads(generation.read_text(encoding="utf-8"))
        return tokens | {key: stated[key] for key in tokens if key in stated}
    _dump(generation, {"_from_model_config": True} | tokens)
    return tokens


def _write_class(folder: Path) -> None:
    """A tokenizer_config.json where there is none; a class that only transformers 5 knows becomes one that 4 knows."""
    path = folder / "tokenizer_config.json"
    content = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    if content.get("tokenizer_class", "TokenizersBackend") == "TokenizersBackend":
        _dump(path, content | {"tokenizer_class": "PreTrainedTokenizerFast"})


def _write_bytes(folder: Path) -> None:
    """256 byte letters without merges, and the end token: ids are bytes."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    letters = _byte_letters()
    library = Tokenizer(models.BPE(vocab={letter: byte for byte, letter in enumerate(letters)}, merges=[]))
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    library.decoder = decoders.ByteLevel()
    library.add_special_tokens([END])
    library.save(str(folder / "tokenizer.json"))
    _dump(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "eos_token": END,
            "clean_up_tokenization_spaces": False,
            "model_max_length": 10**30,
        },
    )


def _byte_letters() -> list[str]:
    """The letter that GPT-2's byte-level alphabet writes for each byte: itself if seen, else the next from 256."""
    seen = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    hidden = [byte for byte in range(256) if byte not in seen]
    return [chr(byte) if byte in seen else chr(256 + hidden.index(byte)) for byte in range(256)]


def _dump(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
