"""Fixtures for every room."""

import pytest
from backbones import BACKBONES


@pytest.fixture(params=BACKBONES)
def backbone(request):
    """Name of each kind of backbone in turn."""
    return request.param
