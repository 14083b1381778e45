"""Token files are read as what they are: by header, by index, by name; never by guess."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest

from moe_dtensor.config.errors import ConfigError
from moe_dtensor.data import Loader, build_corpus, describe
from moe_dtensor.data.token_files import HEADER_BYTES, Header, open_token_file
from tests.data.test_tokens import END, make_ids

CODES = {"uint8": 1, "int8": 2, "int16": 3, "int32": 4, "int64": 5, "float64": 6, "float32": 7, "uint16": 8}


def write_pair(path: Path, documents: list[np.ndarray], dtype: str) -> None:
    """Megatron's layout, written by hand: path.bin and path.idx."""
    ids = np.concatenate(documents).astype(np.dtype(dtype).newbyteorder("<"))
    ids.tofile(path.with_suffix(".bin"))
    sizes = np.array([len(d) for d in documents], "<i4")
    pointers = np.concatenate([[0], np.cumsum(sizes[:-1])]).astype("<i8") * ids.itemsize
    header = b"MMIDIDX\x00\x00" + struct.pack("<Q", 1) + struct.pack("<B", CODES[dtype])
    header += struct.pack("<QQ", len(documents), len(documents) + 1)
    borders = np.arange(len(documents) + 1, dtype="<i8")
    path.with_suffix(".idx").write_bytes(header + sizes.tobytes() + pointers.tobytes() + borders.tobytes())


def in_documents(ids: np.ndarray) -> list[np.ndarray]:
    return np.split(ids, np.flatnonzero(ids == END)[:-1] + 1)


def batches(config, count: int = 40) -> np.ndarray:
    loader = Loader(config, build_corpus(config))
    return np.stack([loader.next_batch(0, 4).tokens_BS.numpy() for _ in range(count)])


@pytest.mark.parametrize("dtype", ["int16", "int32", "int64", "uint16", "float32", "float64"])
def test_a_megatron_pair_gives_the_ids_of_an_array(make_config, tmp_path: Path, dtype: str) -> None:
    """An int32 .bin was read as uint16: every second id was 0, and the loss looked better."""
    ids = make_ids()
    np.save(tmp_path / "a.npy", ids)
    write_pair(tmp_path / "b", in_documents(ids), dtype)
    expected = batches(make_config(corpus="tokens", path=str(tmp_path / "a.npy")))
    for name in ("b.bin", "b.idx", "b"):
        config = make_config(corpus="tokens", path=str(tmp_path / name))
        np.testing.assert_array_equal(batches(config), expected)
    assert "1 megatron" in describe(config, build_corpus(config))


@pytest.mark.parametrize("dtype", ["uint8", "int8"])
def test_pairs_of_one_byte_ids(make_config, tmp_path: Path, dtype: str) -> None:
    ids = make_ids() % 100
    np.save(tmp_path / "a.npy", ids)
    write_pair(tmp_path / "b", [ids[:500], ids[500:]], dtype)
    config = make_config(corpus="tokens", path=str(tmp_path / "b.bin"))
    np.testing.assert_array_equal(batches(config), batches(make_config(corpus="tokens", path=str(tmp_path / "a.npy"))))


def test_shards_are_one_array_in_the_order_of_their_names(make_config, tmp_path: Path) -> None:
    ids = make_ids()
    (tmp_path / "shards").mkdir()
    np.save(tmp_path / "a.npy", ids)
    for i, part in enumerate(np.array_split(ids, 3)):
        write_pair(tmp_path / "shards" / f"{i}", [part], "int32")
    np.save(tmp_path / "shards" / "3.npy", ids[:0])
    np.testing.assert_array_equal(
        batches(make_config(corpus="tokens", path=str(tmp_path / "shards"))),
        batches(make_config(corpus="tokens", path=str(tmp_path / "a.npy"))),
    )


def test_wider_ids_without_a_name_are_refused(make_config, tmp_path: Path) -> None:
    make_ids().astype("<u4").tofile(tmp_path / "a.bin")
    with pytest.raises(ConfigError, match=r"(?s)every second one is 0.*\*\.uint32\.bin"):
        build_corpus(make_config(corpus="tokens", path=str(tmp_path / "a.bin")))


def damage(path: Path, how: str) -> None:
    index, ids = path.with_suffix(".idx"), path.with_suffix(".bin")
    raw = bytearray(index.read_bytes())
    if how == "ids cut":
        ids.write_bytes(ids.read_bytes()[:-4])
    elif how == "index cut":
        raw = raw[:60]
    elif how == "version":
        raw[9] = 2
    elif how == "code":
        raw[17] = 99
    elif how == "pointers":
        raw[34 + 4 * 33 + 8] ^= 4
    elif how == "old":
        raw[:6] = b"TNTIDX"
    index.write_bytes(raw)


@pytest.mark.parametrize("how", ["ids cut", "index cut", "version", "code", "pointers", "old"])
def test_an_index_that_contradicts_its_ids_is_refused(make_config, tmp_path: Path, how: str) -> None:
    write_pair(tmp_path / "b", in_documents(make_ids()), "int32")
    damage(tmp_path / "b", how)
    with pytest.raises(ConfigError, match=r"b\.idx"):
        build_corpus(make_config(corpus="tokens", path=str(tmp_path / "b.bin")))


def write_with_header(path: Path, ids: np.ndarray, **changed) -> None:
    import hashlib

    raw = ids.astype("<u2").tobytes()
    header = {
        "dtype": "<u2",
        "tokens": len(ids),
        "documents": int((ids == END).sum()),
        "vocab_size": 257,
        "end_id": 256,
        "tokenizer": "bytes-257",
        "checksum": hashlib.blake2b(raw, digest_size=16).hexdigest(),
    }
    path.write_bytes(Header(**{**header, **changed}).to_bytes() + raw)


def test_a_file_with_a_header_is_read_by_it(make_config, tmp_path: Path) -> None:
    ids = make_ids()
    np.save(tmp_path / "a.npy", ids)
    write_with_header(tmp_path / "b.tokens", ids)
    assert open_token_file("data.path", str(tmp_path / "b.tokens")).offset == HEADER_BYTES
    np.testing.assert_array_equal(
        batches(make_config(corpus="tokens", path=str(tmp_path / "b.tokens"))),
        batches(make_config(corpus="tokens", path=str(tmp_path / "a.npy"))),
    )


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"tokens": 7}, "must hold 7 ids of 2 bytes"),
        ({"vocab_size": 300}, "another tokenizer"),
        ({"tokenizer": "other"}, "another tokenizer"),
        ({"checksum": "0" * 32}, "checksum differs"),
        ({"version": 9}, "version 9"),
        ({"dtype": "nonsense"}, "broken header"),
    ],
)
def test_a_header_that_does_not_fit_is_refused(make_config, tmp_path: Path, changed: dict, message: str) -> None:
    write_with_header(tmp_path / "b.tokens", make_ids(), **changed)
    with pytest.raises(ConfigError, match=message):
        build_corpus(make_config(corpus="tokens", path=str(tmp_path / "b.tokens")))


def test_a_mask_without_end_tokens_is_refused(make_config, tmp_path: Path) -> None:
    """It did nothing, in silence."""
    np.save(tmp_path / "a.npy", make_ids() % 256)
    config = make_config(corpus="tokens", path=str(tmp_path / "a.npy"), document_mask=True)
    with pytest.raises(ConfigError, match=r"goes by end tokens \(id 256\).*has none"):
        build_corpus(config)
    write_pair(tmp_path / "b", [np.arange(50), np.arange(256, 206, -1)] * 9, "int32")  # 256 only begins documents
    config = make_config(corpus="tokens", path=str(tmp_path / "b.bin"), document_mask=True)
    with pytest.raises(ConfigError, match=r"none at the end of its documents"):
        build_corpus(config)


def test_an_id_outside_the_vocabulary_is_found_before_training(make_config, tmp_path: Path) -> None:
    """It ended the run at the step that met it, on the rank that met it, without a sentence."""
    ids = make_ids()
    ids[700] = 257
    np.save(tmp_path / "a.npy", ids)
    with pytest.raises(ConfigError, match=r"\[0, 257\).*257"):
        build_corpus(make_config(corpus="tokens", path=str(tmp_path / "a.npy")))


def test_validation_tokens_that_are_also_trained_on_are_refused(make_config, tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", make_ids())
    np.save(tmp_path / "b.npy", make_ids())
    config = make_config(corpus="tokens", path=str(tmp_path), validation_path=str(tmp_path / "b.npy"))
    with pytest.raises(ConfigError, match=r"both match .*b\.npy"):
        build_corpus(config)
