"""The comparison's own rules: who has the next turn, that prompts are new, and whose answers are held against whose."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from braid.benchmarks import compare
from braid.benchmarks.contenders import Contender
from braid.benchmarks.rivals.engine_process import Command

A, B, SLOW = (Contender(name, Command([]), rounds=1 if name == "slow" else None) for name in ("a", "b", "slow"))


def test_every_round_begins_with_another_engine_and_slow_ones_take_part_in_few() -> None:
    assert [list(compare.turns([A, B, SLOW], number)) for number in range(4)] == [[A, B, SLOW], [B, A], [A, B], [A, B]]


def test_prompts_are_the_same_for_all_engines_and_new_in_every_round_and_job() -> None:
    drawn = [compare.draw_prompts(2, 16, number, job) for number in range(3) for job in range(3)]
    assert compare.draw_prompts(2, 16, 0, 0) == drawn[0]
    assert len({tuple(prompt) for prompts in drawn for prompt in prompts}) == 18


def test_first_tokens_are_held_against_those_of_our_first_engine() -> None:
    engines: dict[str, Any] = {
        "lost": {"is_ours": True, "failed": "gone"},
        "ours": {"is_ours": True, "answers": {"1": [[5, 6]], "8": [[7, 8], [9, 1]]}},
        "rival": {"is_ours": False, "answers": {"1": [[5, 9]], "8": [[7, 9], [3, 1]]}},
    }
    compare.compare_answers(engines)
    assert engines["ours"] == {"is_ours": True, "same_first_token": 1.0}
    assert engines["rival"] == {"is_ours": False, "same_first_token": pytest.approx(2 / 3)}


def test_a_section_that_does_not_exist_is_not_measured_in_silence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "compare.json"
    monkeypatch.setattr(sys, "argv", ["compare", "--only", "bf61", "--out", str(out)])
    with pytest.raises(SystemExit):
        compare.main()
    assert "no section bf61; there are bf16, fp32, http" in capsys.readouterr().err
    assert not out.exists()
