"""Licence files are found by name; restrictions by name or by what the text says."""

from pathlib import Path

import pytest

from braid.model.licences import find_licences


@pytest.mark.parametrize(
    ("files", "found", "restricted_by"),
    [
        ({}, (), ()),
        ({"LICENSE": "MIT License. Permission is hereby granted"}, ("LICENSE",), ()),
        (
            {"LICENSE-CODE": "MIT License", "LICENSE-MODEL": "DEEPSEEK LICENSE AGREEMENT"},
            ("LICENSE-CODE", "LICENSE-MODEL"),
            ("LICENSE-MODEL",),
        ),
        (
            {"licence.txt": "You agree to the use-based restrictions in Attachment A"},
            ("licence.txt",),
            ("licence.txt",),
        ),
        ({"LICENSE": "more than 100 million monthly active users"}, ("LICENSE",), ("LICENSE",)),
        ({"MODEL_LICENSE.md": "x"}, ("MODEL_LICENSE.md",), ("MODEL_LICENSE.md",)),
        ({"README.md": "use restrictions", "relicensed.py": ""}, (), ()),
    ],
)
def test_finds_and_reads(
    tmp_path: Path, files: dict[str, str], found: tuple[str, ...], restricted_by: tuple[str, ...]
) -> None:
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    licences = find_licences(tmp_path)
    assert licences.files == found
    assert licences.restricted_by == restricted_by
    assert len(licences.notices) == (1 if restricted_by else 0)
    assert all(name in notice for notice in licences.notices for name in restricted_by)


def test_a_folder_or_bytes_that_are_no_text_do_no_harm(tmp_path: Path) -> None:
    (tmp_path / "LICENSE").write_bytes(b"\xff\xfe use restrictions")
    (tmp_path / "LICENSE-MODEL").mkdir()
    assert find_licences(tmp_path).restricted_by == ("LICENSE",)
