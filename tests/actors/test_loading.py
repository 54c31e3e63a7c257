"""How much memory a worker may take: the machine's, or what its container leaves."""

from __future__ import annotations

from pathlib import Path

import psutil

from braid.actors.loading import available_memory

MIB = 1 << 20


def test_the_page_cache_of_a_checkpoint_does_not_count_against_a_container(tmp_path: Path) -> None:
    (tmp_path / "memory.current").write_text(f"{90 * MIB}\n")
    (tmp_path / "memory.stat").write_text(f"anon {30 * MIB}\ninactive_file {50 * MIB}\nactive_file {10 * MIB}\n")
    (tmp_path / "memory.max").write_text(f"{100 * MIB}\n")
    assert available_memory(tmp_path) == 70 * MIB
    (tmp_path / "memory.max").write_text(f"{20 * MIB}\n")
    assert available_memory(tmp_path) == 0
    (tmp_path / "memory.max").write_text("max\n")
    assert available_memory(tmp_path) > 100 * MIB


def test_without_a_container_the_machine_decides(tmp_path: Path) -> None:
    assert 0 < available_memory(tmp_path) <= psutil.virtual_memory().total
