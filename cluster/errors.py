"""What can go wrong in the control plane, one class per thing the caller does next.

BraidError
├── SpecError           the ClusterSpec or a flag is wrong: correct the value that the message names (also a ValueError)
├── ClusterExists       a cluster of this name is up: take another name, or `braid down` it first
├── ClusterNotFound     no cluster of this name was started here: see `braid status`
├── ClusterStuck        a cluster is there and does not answer, or does not end: do what the message says
├── StartFailed         the cluster could not start and everything was taken down again: read the reason
├── WorkerDied          a worker's process is gone: the controller takes it out of the next view
├── AnswerRefused       a running cluster answered a client of ours, and the answer is no: the message is its own
└── IllegalTransition   a defect in Braid: report it with the story in the message
"""

from __future__ import annotations


class BraidError(Exception):
    """Anything that ends a command with one clear line instead of a traceback."""


class SpecError(BraidError, ValueError):
    pass


class ClusterExists(BraidError):
    pass


class ClusterNotFound(BraidError):
    pass


class ClusterStuck(BraidError):
    pass


class StartFailed(BraidError):
    pass


class WorkerDied(BraidError):
    pass


class AnswerRefused(BraidError):
    pass


class IllegalTransition(BraidError):
    pass


def in_words(error: BaseException) -> str:
    """One line that names the kind of error unless the message speaks for itself."""
    text = " ".join(str(error).split())
    if isinstance(error, (ValueError, BraidError)) and text:
        return text
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
