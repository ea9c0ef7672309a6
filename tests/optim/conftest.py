"""The batch on which captures are tested."""

import pytest
from optim.captured import batch


@pytest.fixture
def data():
    """Inputs and labels for `captured.small`."""
    return batch()
