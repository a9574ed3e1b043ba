"""Which tests run, and in which order."""

import pytest


def pytest_configure(config):
    config.addinivalue_line("markers", "long: takes many seconds; it starts first, so that no worker ends on it")


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: item.get_closest_marker("long") is None)
