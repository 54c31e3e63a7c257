"""Finds the licence files beside a checkpoint and says when they restrict what the model may be used for."""

import re
from dataclasses import dataclass
from pathlib import Path

_FILE_NAME = re.compile(r"(^|[-_.])licen[sc]e([-_.]|$)", re.IGNORECASE)
# DeepSeek's model licence comes as LICENSE-MODEL and speaks of "use-based restrictions" (its Attachment A).
_MODEL_FILE_NAME = re.compile(r"licen[sc]e[-_.]model|model[-_.]licen[sc]e", re.IGNORECASE)
_RESTRICTION = re.compile(
    r"use[- ](based )?restrictions?|restrictions? on use|acceptable use|monthly active users", re.IGNORECASE
)
# Licences are some tens of kB; what is longer is not one.
_MAX_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class Licences:
    files: tuple[str, ...]
    restricted_by: tuple[str, ...]

    @property
    def notices(self) -> tuple[str, ...]:
        """At most one short sentence, for `inspect`, start-up and /v1/models."""
        if not self.restricted_by:
            return ()
        names = " and ".join(self.restricted_by)
        return (f"This model carries use restrictions: read {names} beside its weights before you serve or share it.",)


def find_licences(path: Path) -> Licences:
    """`path` is the checkpoint's folder."""
    files = [file for file in sorted(path.iterdir()) if file.is_file() and _FILE_NAME.search(file.name)]
    restricted = [file.name for file in files if _is_restrictive(file)]
    return Licences(tuple(file.name for file in files), tuple(restricted))


def _is_restrictive(file: Path) -> bool:
    if _MODEL_FILE_NAME.search(file.name):
        return True
    with file.open("rb") as text:
        return bool(_RESTRICTION.search(text.read(_MAX_BYTES).decode("utf-8", "replace")))
