"""What the times of tokens say: pure arithmetic over a job, which is some prompts sent at once."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

Times = Sequence[Sequence[float]]  # per prompt, when each of its tokens was there, in seconds since the job began


@dataclass(frozen=True, slots=True)
class Summary:
    """Of one figure over the rounds of a run."""

    median: float
    least: float
    most: float
    rounds: int


def summary(values: Sequence[float]) -> Summary:
    if not values:
        raise ValueError("no values to sum up: every figure needs at least one round")
    return Summary(statistics.median(values), min(values), max(values), len(values))


def decode_tokens_per_s(times: Times) -> float:
    """While every prompt has its first token and none has its last: no prefill is timed, and no emptying batch.

    Engines that decode the first answers while they compute the last prompts gain and lose nothing by it. Where no such
    time was (few tokens, staggered starts), all tokens behind the first over all the time behind the first.
    """
    begin, end = max(t[0] for t in times), min(t[-1] for t in times)
    if end > begin:
        return sum(sum(begin < t <= end for t in each) for each in times) / (end - begin)
    first, last = min(t[0] for t in times), max(t[-1] for t in times)
    return (sum(len(each) for each in times) - 1) / max(last - first, 1e-9)


def time_to_first_token_s(times: Times) -> float:
    """Until the last prompt of the job has its first token."""
    return max(t[0] for t in times)


def prefill_tokens_per_s(times: Times, prompt_tokens: int) -> float:
    """`prompt_tokens`: of all prompts together."""
    return prompt_tokens / time_to_first_token_s(times)


def end_to_end_tokens_per_s(times: Times) -> float:
    return sum(len(each) for each in times) / max(t[-1] for t in times)


def tpot_ms(times: Times) -> float:
    """Time per output token behind the first, the median over the prompts, in milliseconds."""
    return 1e3 * statistics.median((t[-1] - t[0]) / max(len(t) - 1, 1) for t in times)


def best_of(values: Mapping[str, float], is_smaller_better: bool = False) -> str:
    """Whose value is best; the first of equals."""
    choose = min if is_smaller_better else max
    return choose(values, key=lambda name: values[name])


def agreement(answers: Sequence[Sequence[int]], others: Sequence[Sequence[int]]) -> float:
    """Share of answers whose first tokens are equal: whether two engines compute the same model at all."""
    if not answers or len(answers) != len(others):
        raise ValueError(f"{len(answers)} answers cannot be held against {len(others)}; both engines need the same job")
    return sum(a[0] == b[0] for a, b in zip(answers, others, strict=True)) / len(answers)
