"""Turns the token items of one request, in whatever order its two workers' links deliver them, into deltas of text."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Literal

from ..model.detokenizer import IncrementalDecoder
from ..model.sampling_params import SamplingParams
from .request import Delta, TokenLogprob, Usage
from .stop_strings import StopScanner

Finish = Literal["stop", "length"]
TokenItem = dict[str, Any]  # actors/messages.py: TokenItem


def token_logprobs(token_ids: Sequence[int], wire: list[Any] | None) -> tuple[TokenLogprob, ...] | None:
    """[[logprob, [[token_id, logprob], ...]] | None, ...] -> one TokenLogprob per token."""
    if wire is None:
        return None
    assert len(wire) == len(token_ids), f"{len(wire)} logprobs for {len(token_ids)} tokens"
    pairs = zip(token_ids, wire, strict=True)
    return tuple(
        TokenLogprob(token, None)
        if entry is None
        else TokenLogprob(token, entry[0], tuple((top, logprob) for top, logprob in entry[1]))
        for token, entry in pairs
    )


class OutputStream:
    """Output of one request. `num_tokens` is what has been turned into deltas; `is_done` after the last delta."""

    def __init__(
        self, prompt_ids: tuple[int, ...], params: SamplingParams, stops: tuple[str, ...], decoder: IncrementalDecoder
    ) -> None:
        self.prompt_ids = prompt_ids
        self.params = params
        self.decoder = decoder
        self.scanner = StopScanner(stops)
        self.num_tokens = 0
        self.num_cached = 0
        self.num_accepted = 0
        self.num_rejected = 0
        self.is_done = False
        self.is_cut = False  # by a stop string, which its worker does not know of
        self.early: dict[int, TokenItem] = {}  # by index: items that overtook an earlier one

    def push(self, item: TokenItem) -> Iterator[Delta]:
        """Deltas for every item that is now in order. Repeated items and those after the end are dropped."""
        if item["index"] < self.num_tokens:
            return
        self.early[item["index"]] = item
        while not self.is_done and (following := self.early.pop(self.num_tokens, None)) is not None:
            yield self._delta(following)

    def _delta(self, item: TokenItem) -> Delta:
        token_ids: list[int] = item["token_ids"]
        self.num_cached = max(self.num_cached, item.get("cached") or 0)
        self.num_accepted = max(self.num_accepted, item.get("accepted") or 0)
        self.num_rejected = max(self.num_rejected, item.get("rejected") or 0)
        text, used, stop = self._text(token_ids, item.get("finish"))
        self.num_tokens += used
        finish: Finish | None = "stop" if stop is not None else item.get("finish")
        self.is_done = finish is not None
        self.is_cut = self.is_done and not item.get("finish")
        logprobs = item.get("logprobs")
        return Delta(
            text,
            tuple(token_ids[:used]),
            token_logprobs(token_ids[:used], logprobs and logprobs[:used]),
            token_logprobs(self.prompt_ids, item.get("prompt_logprobs")),
            finish,
            stop if stop is not None else self._stop_token(token_ids, finish),
            self._usage() if self.is_done else None,
        )

    def _usage(self) -> Usage:
        accepted = min(self.num_accepted, self.num_tokens)  # some may lie behind a stop string
        return Usage(len(self.prompt_ids), self.num_tokens, self.num_cached, accepted, self.num_rejected)

    def _text(self, token_ids: list[int], finish: str | None) -> tuple[str, int, str | None]:
        """The text that may leave, the number of tokens it took, and the stop string that cut it short."""
        pieces: list[str] = []
        for place, token_id in enumerate(token_ids, start=1):
            ends_it = finish == "stop" and place == len(token_ids)
            text = "" if ends_it else self.decoder.push(token_id)  # the token that says "end" is not text
            out, stop = self.scanner.push(text, armed=self.num_tokens + place > self.params.min_tokens)
            pieces.append(out)
            if stop is not None:
                return "".join(pieces), place, stop
        if finish is None:
            return "".join(pieces), len(token_ids), None
        armed = self.num_tokens + len(token_ids) > self.params.min_tokens
        out, stop = self.scanner.push(self.decoder.flush(), armed)
        pieces += [out, self.scanner.flush()]
        return "".join(pieces), len(token_ids), stop

    def _stop_token(self, token_ids: list[int], finish: str | None) -> int | None:
        is_named = finish == "stop" and bool(token_ids) and token_ids[-1] in self.params.stop_token_ids
        return token_ids[-1] if is_named else None
