"""Encoding follows the checkpoint's files; pieces of text add up to the whole decode and never split a character."""

import json
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from braid.model.detokenizer import BYTE_OF_CHAR, WindowDecoder, byte_level_bytes
from braid.model.tokenizer import Tokenizer

BOS, EOS, USER = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜User｜>"  # noqa: RUF001  DeepSeek's own bars
CORPUS = [
    "def add(a, b):\n    return a + b\n",
    "naïve café 😀 👩‍👩‍👧 日本語",
    "the quick brown fox jumps over the lazy dog",
] * 4


def byte_level() -> tokenizers.Tokenizer:
    inner = tokenizers.Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    inner.train_from_iterator(
        CORPUS, trainers.BpeTrainer(vocab_size=330, initial_alphabet=alphabet, show_progress=False)
    )
    inner.add_special_tokens([BOS, EOS])
    inner.add_tokens([AddedToken(USER, normalized=False), AddedToken("<think>", normalized=False)])
    return inner


def save(directory: Path, inner: tokenizers.Tokenizer, **config: Any) -> Tokenizer:
    inner.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    return Tokenizer(directory)


def write_tokenizer(directory: Path, **config: Any) -> Tokenizer:
    return save(directory, byte_level(), **{"bos_token": BOS, "eos_token": {"content": EOS}, **config})


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return write_tokenizer(tmp_path_factory.mktemp("tokenizer"), add_bos_token=True, add_eos_token=False)


def pieces(tokenizer: Tokenizer, ids: list[int], skip: bool = True) -> list[str]:
    decoder = tokenizer.decoder(skip)
    return [decoder.push(token_id) for token_id in ids] + [decoder.flush()]


def test_byte_alphabet_is_the_library_s() -> None:
    assert set(BYTE_OF_CHAR) == set(pre_tokenizers.ByteLevel.alphabet())
    assert sorted(BYTE_OF_CHAR.values()) == list(range(256))
    assert byte_level_bytes("Ġhi") == b" hi"
    assert byte_level_bytes(USER) == USER.encode()


def test_special_tokens_ids_and_sizes(tokenizer: Tokenizer) -> None:
    assert tokenizer.decode([tokenizer.bos_id or 0], skip_special_tokens=False) == BOS
    assert (tokenizer.bos_token, tokenizer.eos_token) == (BOS, EOS)
    assert tokenizer.vocab_size == 334
    assert tokenizer.decode([330]) == ""
    assert tokenizer.decode([332]) != ""


@pytest.mark.parametrize("text", ["", "hello", f"{USER}hi{EOS}", "日本語 😀", "a\x00b\r\n"])
def test_encodes_as_transformers_does(tokenizer: Tokenizer, tmp_path: Path, text: str) -> None:
    oracle = PreTrainedTokenizerFast(
        tokenizer_object=byte_level(), bos_token=BOS, eos_token=EOS, add_bos_token=True, add_eos_token=False
    )
    assert tokenizer.encode(text) == oracle(text)["input_ids"]
    assert tokenizer.encode(text, add_special_tokens=False) == oracle(text, add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(tokenizer.encode(text)) == oracle.decode(
        oracle(text)["input_ids"], skip_special_tokens=True, clean_up_tokenization_spaces=False
    )


def test_bos_and_eos_are_added_as_the_files_say(tmp_path: Path) -> None:
    plain = write_tokenizer(tmp_path)
    assert plain.bos_id not in plain.encode("hi")
    both = write_tokenizer(tmp_path, add_bos_token=True, add_eos_token=True)
    assert both.encode("hi") == [both.bos_id, *plain.encode("hi"), both.eos_id]
    inner = byte_level()
    inner.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", special_tokens=[(BOS, inner.token_to_id(BOS))]
    )
    assert save(tmp_path, inner, bos_token=BOS).encode("hi") == [both.bos_id, *plain.encode("hi")]
    assert save(tmp_path, inner, bos_token=BOS, add_bos_token=False).encode("hi") == plain.encode("hi")


def test_truncation_saved_in_the_file_is_ignored(tmp_path: Path) -> None:
    inner = byte_level()
    inner.enable_truncation(2)
    inner.enable_padding(length=9)
    assert save(tmp_path, inner).decode(save(tmp_path, inner).encode("the lazy dog!")) == "the lazy dog!"


@settings(max_examples=150, deadline=None)
@given(text=st.text(max_size=40))
def test_pieces_add_up_to_the_text(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    parts = pieces(tokenizer, ids)
    assert "".join(parts) == tokenizer.decode(ids)
    if "\ufffd" not in text:
        assert all("\ufffd" not in part for part in parts)


@settings(max_examples=300, deadline=None)
@given(ids=st.lists(st.integers(0, 340), max_size=40), skip=st.booleans())
def test_pieces_add_up_for_any_tokens(tokenizer: Tokenizer, ids: list[int], skip: bool) -> None:
    """Most of these byte sequences are no valid UTF-8, and some ids lie beyond the vocabulary."""
    assert "".join(pieces(tokenizer, ids, skip)) == tokenizer.decode(ids, skip)


def test_an_emoji_over_several_tokens_comes_whole(tokenizer: Tokenizer) -> None:
    by_bytes = {tokenizer.token_bytes(token_id): token_id for token_id in range(tokenizer.vocab_size)}
    ids = [by_bytes[bytes([byte])] for byte in "a😀é".encode()]
    assert pieces(tokenizer, ids) == ["a", "", "", "", "😀", "", "é", ""]
    assert pieces(tokenizer, ids[:3]) == ["a", "", "", "\ufffd"]


def test_a_decoder_starts_anew_after_flush(tokenizer: Tokenizer) -> None:
    decoder = tokenizer.decoder()
    ids = tokenizer.encode("日", add_special_tokens=False)
    decoder.push(ids[0])
    decoder.flush()
    assert "".join(decoder.push(token_id) for token_id in ids) + decoder.flush() == "日"


def test_special_tokens_are_skipped_unless_wanted(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode(f"{USER}hi{EOS}")
    assert "".join(pieces(tokenizer, ids)) == f"{USER}hi"
    assert "".join(pieces(tokenizer, ids, skip=False)) == f"{BOS}{USER}hi{EOS}"


def metaspace() -> tokenizers.Tokenizer:
    inner = tokenizers.Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Metaspace()
    inner.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokens = ["<unk>", *[f"<0x{byte:02X}>" for byte in range(256)]]
    inner.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=420, special_tokens=tokens, show_progress=False))
    return inner


def words() -> tokenizers.Tokenizer:
    inner = tokenizers.Tokenizer(models.WordLevel(unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    inner.train_from_iterator(CORPUS, trainers.WordLevelTrainer(special_tokens=["[UNK]"], show_progress=False))
    return inner


@pytest.mark.parametrize("make", [metaspace, words])
@pytest.mark.parametrize(
    "text", ["the quick brown fox", "naïve café the dog", "def add ( a , b )", "the 日本語 the", ""]
)
def test_other_vocabularies_stream_too(tmp_path: Path, make: Any, text: str) -> None:
    tokenizer = save(tmp_path, make())
    ids = tokenizer.encode(text)
    assert "".join(pieces(tokenizer, ids)) == tokenizer.decode(ids)


def test_a_token_without_text_costs_a_window_decoder_nothing(tmp_path: Path) -> None:
    tokenizer = save(tmp_path, words())
    decoder = tokenizer.decoder()
    assert isinstance(decoder, WindowDecoder)
    the, unknown = tokenizer.encode("the ☃")
    out = [decoder.push(token_id) for token_id in [the, *[unknown] * 50, the]]
    assert "".join(out) == tokenizer.decode([the, the])
    assert len(decoder._window) <= 2


def test_lone_surrogates_are_refused(tokenizer: Tokenizer) -> None:
    with pytest.raises(ValueError, match="lone surrogate"):
        tokenizer.encode("a\ud800b")


def test_without_a_tokenizer_there_are_ids_and_no_text(tmp_path: Path) -> None:
    tokenizer = Tokenizer(tmp_path)
    assert not tokenizer.has_text
    assert pieces(tokenizer, [1, 2, 3]) == ["", "", "", ""]
    assert (tokenizer.decode([1, 2]), tokenizer.token_bytes(1), tokenizer.vocab_size) == ("", b"", 0)
    with pytest.raises(ValueError, match=r"the model has no tokenizer: send token ids"):
        tokenizer.encode("hi")


def test_broken_files_are_named(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ValueError, match=r"tokenizer\.json is not a tokenizer"):
        Tokenizer(tmp_path)
    byte_level().save(str(tmp_path / "tokenizer.json"))
    assert Tokenizer(tmp_path).bos_id is None
    (tmp_path / "tokenizer_config.json").write_text("nope")
    with pytest.raises(ValueError, match=r"tokenizer_config\.json is not JSON"):
        Tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("[]")
    with pytest.raises(ValueError, match="must hold an object"):
        Tokenizer(tmp_path)
