"""Programs that are asked."""

import pytest
from asked import tool


@pytest.fixture(scope="session")
def promtool():
    return tool("promtool", "prometheus")
