"""What a request must be before a worker takes it in: what is wrong with one would fail a step, and all others in it.

A front end has checked the same; a worker does not depend on that, nor on both being of one version.
"""

from __future__ import annotations

import math

from ..model.config import ModelConfig
from .sequence import Sequence

WANTED: dict[str, type | tuple[type, ...]] = {
    "id": str,
    "front": str,
    "target": str,
    "carrier": dict,
    "deadline": (int, float),
    "number": int,
    "priority": int,
    "caller": str,
}


def check_fields(sequence: Sequence) -> None:
    """Raises ValueError where its sender does not keep to the words of links: there is nobody to answer."""
    for name, wanted in WANTED.items():
        if not isinstance(value := getattr(sequence, name), wanted):
            raise ValueError(f"the {name} of a request is {value!r}")
    if not math.isfinite(sequence.deadline):
        raise ValueError(f"the deadline of {sequence.id} is {sequence.deadline}")
    if not all(isinstance(text, str) for header in sequence.carrier.items() for text in header):
        raise ValueError(f"the trace headers of {sequence.id} are {sequence.carrier!r}")


def check_request(sequence: Sequence, config: ModelConfig) -> None:
    """Raises ValueError saying what of the request this model cannot serve."""
    check_tokens(sequence.tokens, config)
    if not sequence.tokens:
        raise ValueError("the prompt is empty: send at least one token")
    sequence.params.check()
    if sequence.max_length > config.max_position_embeddings:
        raise ValueError(
            f"a prompt of {sequence.num_prompt} tokens and max_tokens {sequence.params.max_tokens} take "
            f"{sequence.max_length} positions and the model has {config.max_position_embeddings}: "
            "shorten the prompt or lower max_tokens"
        )


def check_tokens(tokens: list[int], config: ModelConfig) -> None:
    """Raises ValueError naming a token that the vocabulary does not have."""
    if not set(map(type, tokens)) <= {int} or not all(0 <= token < config.vocab_size for token in tokens):
        bad = next(token for token in tokens if type(token) is not int or not 0 <= token < config.vocab_size)
        raise ValueError(f"token id {bad!r}: use integers from 0 to {config.vocab_size - 1}")
