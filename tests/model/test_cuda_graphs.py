"""What a capture needs of its surroundings, as far as that can be seen without a GPU."""

from __future__ import annotations

import gc

from braid.model.cuda_graphs import uncollected


def test_nothing_is_collected_in_a_capture_and_as_before_after_it() -> None:
    with uncollected():
        assert not gc.isenabled()
        with uncollected():
            pass
        assert not gc.isenabled()
    assert gc.isenabled()
