"""One Ray head for both tests that need one: starting it takes a quarter of a minute."""

from collections.abc import Iterator

import pytest
from ray_head import RayHead, ray_head


@pytest.fixture(scope="session")
def head() -> Iterator[RayHead]:
    with ray_head(labels="role=head") as started:
        yield started
