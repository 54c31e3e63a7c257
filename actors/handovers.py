"""Prompts that are computed here and go on at a decode worker: from KV_OPEN until it has all rows and a first token."""

from __future__ import annotations

from collections.abc import Callable

from .kv_sender import KvSender, LayerSender, Span
from .kv_transfer import open_message
from .links import Link
from .messages import Kind, pack, unpack
from .peers import Peers
from .reactor import Received
from .scheduler import Plan
from .sequence import Sequence


class Handovers:
    """The prefill worker's half of a KV transfer."""

    def __init__(self, peers: Peers, sender: KvSender) -> None:
        self.sender = sender
        self._peers = peers
        self._layer_sender = LayerSender(sender, [])
        self._open: dict[tuple[str, int], Sequence] = {}  # by decode worker and number
        self._accepted: list[Sequence] = []  # since it was asked last who is ready

    def open(self, sequence: Sequence) -> bool:
        """Asks the decode worker to go on with it later; False if there is no link."""
        link = self._peers.link_to(sequence.target)
        if link is None or not self._peers.send(link, Kind.KV_OPEN, open_message(sequence)):
            return False
        self._open[sequence.target, sequence.number] = sequence
        return True

    def accept(self, event: Received) -> None:
        """The decode worker has room, and some of the prompt's positions already."""
        body = unpack(event.message.meta)
        sequence = self._open.get((event.link.peer.name, body["number"]))
        if sequence is not None:
            if type(body["have"]) is not int or not 0 <= body["have"] <= sequence.num_prompt:
                raise ValueError(f"it has {body['have']} positions of a prompt of {sequence.num_prompt} tokens")
            sequence.accepted, sequence.kv_have = True, body["have"]
            self._accepted.append(sequence)

    def take(self, peer: str, number: int) -> Sequence | None:
        """The decode worker will not go on with it."""
        return self._open.pop((peer, number), None)

    def layer_sender(self, plan: Plan, is_whole: Callable[[], bool]) -> LayerSender:
        """The `on_layer` hook of a step: every layer's new prompt rows leave as soon as it has run.

        `is_whole`: whether the pass that runs has lost no rows so far.
        """
        spans = list[Span]()
        for chunk in plan:
            if not chunk.absorbed and (link := self._link_of(chunk.sequence)):
                spans += self.sender.take(chunk.sequence, link, chunk.start, chunk.start + chunk.num)
        self._layer_sender = LayerSender(self.sender, spans, is_whole)
        return self._layer_sender

    def ready(self, plan: Plan) -> list[Sequence]:
        """Sends what links have room for; whose rows have all left may go on elsewhere now. `plan`: what has run."""
        self._layer_sender.finish()
        computed = [chunk.sequence for chunk in plan if not chunk.absorbed and _is_due(chunk.sequence)]
        due, self._accepted = [*computed, *filter(_is_due, self._accepted)], []
        for sequence in due:
            if link := self._link_of(sequence):
                self.sender.take(sequence, link, sequence.num_prompt, sequence.num_prompt)
        due += filter(_is_due, self.sender.drain())
        return [sequence for sequence in dict.fromkeys(due) if not self.sender.is_waiting(sequence)]

    def complete(self, sequence: Sequence) -> bool:
        """The decode worker goes on from the first token; False if it is gone."""
        token, link = sequence.first_token, self._link_of(sequence)
        assert token is not None, f"{sequence.id} handed over without a first token"
        done = pack({"number": sequence.number, "token_id": token.token_id, "drafts": sequence.drafts})
        if link is None or not self._peers.send(link, Kind.KV_DONE, done):
            return False
        del self._open[sequence.target, sequence.number]
        return True

    def drop(self, sequence: Sequence, reason: str) -> None:
        """It ends here: nothing of it leaves any more, and the decode worker hears so if it waits for the rest."""
        self.sender.forget(sequence)
        if link := self._link_of(sequence):
            self._peers.send(link, Kind.KV_ABORT, pack({"number": sequence.number, "reason": reason}))
        self._open.pop((sequence.target, sequence.number), None)

    def _link_of(self, sequence: Sequence) -> Link | None:
        is_open = (sequence.target, sequence.number) in self._open
        return self._peers.link_to(sequence.target) if is_open else None


def _is_due(sequence: Sequence) -> bool:
    """Its first token is known, and the decode worker has room."""
    return sequence.state == "handover" and sequence.accepted
