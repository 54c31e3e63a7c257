"""The training text: the Python standard library of the interpreter at hand, as files, tokenizer and token streams."""

import hashlib
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor

EOS = "<|eos|>"
PAD = "<|pad|>"

# Test suites are 60% of the library and would drown it in assertEqual; encodings and pydoc_data are tables.
SKIPPED_DIRECTORIES = frozenset(
    {
        "site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test",
        "encodings", "pydoc_data", "ensurepip", "turtledemo",
    }
)  # fmt: skip

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}{{ message['content'] }}{{ '\\n' }}"
    "{% else %}{% for line in message['content'].splitlines() %}{{ '# ' + line + '\\n' }}{% endfor %}{% endif %}"
    "{% endfor %}"
)


@dataclass(frozen=True, slots=True)
class Corpus:
    """Texts by relative path; a file is held out by a hash of its path, so the split never moves."""

    training: dict[str, str]
    held_out: dict[str, str]


@dataclass(frozen=True, slots=True)
class TokenStream:
    """Token ids of files joined by the end-of-file token, and the bytes of UTF-8 they stand for."""

    ids: Tensor
    num_bytes: int

    @property
    def bytes_per_token(self) -> float:
        return self.num_bytes / len(self.ids)


def is_held_out(relative_path: str, share: float = 0.04) -> bool:
    digest = hashlib.sha256(relative_path.encode()).digest()
    return int.from_bytes(digest[:4], "big") < share * 2**32


def source_files(root: Path) -> Iterator[tuple[str, str]]:
    """Yields (relative path, text) of every UTF-8 Python file under `root`, in path order."""
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if SKIPPED_DIRECTORIES.intersection(relative.parts):
            continue
        try:
            yield relative.as_posix(), path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue


def read_corpus(root: Path | None = None) -> Corpus:
    root = root or Path(sysconfig.get_paths()["stdlib"])
    corpus = Corpus({}, {})
    for name, text in source_files(root):
        (corpus.held_out if is_held_out(name) else corpus.training)[name] = text
    if not corpus.training or not corpus.held_out:
        raise ValueError(f"{root} holds too few Python files to train on: name a folder of Python source with --corpus")
    return corpus


def train_tokenizer(corpus: Corpus, vocab_size: int) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[PAD, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus.training.values(), trainer)
    return tokenizer


def encode_files(tokenizer: Tokenizer, files: dict[str, str]) -> TokenStream:
    eos_id = tokenizer.token_to_id(EOS)
    assert eos_id is not None, f"the tokenizer lacks {EOS}"
    ids: list[int] = []
    for encoding in tokenizer.encode_batch_fast(list(files.values())):
        ids.extend(encoding.ids)
        ids.append(eos_id)
    return TokenStream(torch.tensor(ids), sum(len(text.encode()) for text in files.values()))


def tokenizer_settings(max_length: int) -> dict[str, object]:
    """tokenizer_config.json: a chat turn is a comment, and the answer is the Python below it."""
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_bos_token": False,
        "add_eos_token": False,
        "bos_token": None,
        "eos_token": EOS,
        "pad_token": PAD,
        "clean_up_tokenization_spaces": False,
        "model_max_length": max_length,
        "chat_template": CHAT_TEMPLATE,
    }


def training_batch(stream: TokenStream, step: int, batch_size: int, seq_len: int) -> Tensor:
    """Returns [batch_size, seq_len + 2] windows: a function of the step alone, so that a run can be resumed.

    Each epoch cuts the stream at another offset and visits its windows in another order.
    """
    width = seq_len + 2
    windows_per_epoch = (len(stream.ids) - width) // seq_len
    if windows_per_epoch < 1:
        raise ValueError(f"the corpus has {len(stream.ids)} tokens, fewer than one sequence of {width}: shorten it")
    rows = []
    for index in range(step * batch_size, (step + 1) * batch_size):
        epoch, position = divmod(index, windows_per_epoch)
        generator = torch.Generator().manual_seed(epoch)
        order = torch.randperm(windows_per_epoch, generator=generator)
        offset = int(torch.randint(seq_len, (1,), generator=generator))
        start = min(int(order[position]) * seq_len + offset, len(stream.ids) - width)
        rows.append(stream.ids[start : start + width])
    return torch.stack(rows)


def held_out_windows(stream: TokenStream, seq_len: int, limit: int) -> Tensor:
    """Returns up to `limit` windows [n, seq_len + 2], spread evenly over the held-out stream."""
    width = seq_len + 2
    count = max(1, min(limit, (len(stream.ids) - 2) // seq_len))
    starts = torch.linspace(0, len(stream.ids) - width, count).long().tolist()
    return torch.stack([stream.ids[start : start + width] for start in starts])
