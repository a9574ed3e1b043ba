"""The pytest plugin of tokenrl: the fixture rollout_batch, for tokenrl.parity.assert_parity.

It stands beside the package, since pytest imports it in every run, and tokenrl imports torch: here only a test that
takes the fixture does.
"""

from typing import Any

import pytest

NAME = "tokenrl_batch"


def pytest_addoption(parser: pytest.Parser) -> None:
    what = "file of tokenrl.record that the fixture rollout_batch gives; without one it is a small one from a seed"
    parser.getgroup("tokenrl").addoption("--tokenrl-batch", metavar="FILE", help=what)
    parser.addini(NAME, what)


@pytest.fixture
def rollout_batch(pytestconfig: pytest.Config) -> Any:
    """A tokenrl.RolloutBatch: the file of --tokenrl-batch, else of the ini file's tokenrl_batch, else
    tokenrl.parity.random_batch()."""
    import tokenrl

    given, ini = pytestconfig.getoption("--tokenrl-batch"), pytestconfig.getini(NAME)
    if given is None and not ini:
        return tokenrl.parity.random_batch()
    return tokenrl.load_batch(given if given is not None else pytestconfig.rootpath / ini)
