"""The pytest plugin: a trainer's test suite, run in a process of its own."""

import re

import pytest
from parity_batches import saved
from paths import ROOT

pytest_plugins = ["pytester"]

SUITE = """
    import tokenrl
    import torch

    def my_loss(logp, old_logp, advantages, mask):
        ratio = torch.exp(torch.where(mask, logp - old_logp, 0))
        loss = torch.maximum(-advantages[:, None] * ratio, -advantages[:, None] * ratio.clamp(0.8, 1.2))
        return ((loss * mask).sum(1) / mask.sum(1)).mean()

    def test_my_loss(rollout_batch):
        tokenrl.parity.assert_parity(my_loss, rollout_batch, "grpo")
"""
WRONG = SUITE.replace("/ mask.sum(1)", "/ mask.shape[1]")


@pytest.fixture
def suite(pytester, monkeypatch):
    """A folder whose pytest finds the plugin by its entry point, as where tokenrl is installed."""
    folder = pytester.mkdir("site") / "plugin_of_tokenrl-0.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: plugin-of-tokenrl\nVersion: 0\n")
    table = re.search(r"\[project.entry-points.pytest11\]\n(.*?)\n\n", (ROOT / "pyproject.toml").read_text(), re.S)[1]
    (folder / "entry_points.txt").write_text("[pytest11]\n" + table.replace('"', ""))
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}:{folder.parent}")
    monkeypatch.delenv("PYTEST_PLUGINS", raising=False)
    return pytester


def ran(suite, *options):
    return suite.runpytest_subprocess("-p", "no:cacheprovider", *options)


def test_a_right_loss_passes_and_a_wrong_one_is_explained(suite):
    suite.makepyfile(test_right=SUITE, test_wrong=WRONG)
    done = ran(suite)
    done.assert_outcomes(passed=1, failed=1)
    done.stdout.fnmatch_lines(["*my_loss is not 'grpo' in float32*", "*gradient by logp: * error *, allowed *"])


def test_a_file_may_be_named(suite):
    """By the ini file, and by the option, which stands above it."""
    suite.makepyfile("def test(rollout_batch):\n    assert rollout_batch.tokens.shape == (3, 4096)")
    saved("long", suite.path)
    suite.makeini("[pytest]\ntokenrl_batch = long.safetensors")
    ran(suite).assert_outcomes(passed=1)
    damaged = suite.path / "damaged"
    damaged.write_bytes(b"")
    ran(suite, "--tokenrl-batch", damaged).stdout.fnmatch_lines(["*ValueError: path: got *damaged*"])


def test_other_tests_do_not_see_it(suite):
    """Neither torch nor tokenrl is imported, and a fixture of the same name is the suite's own."""
    suite.makepyfile(
        """
        import sys

        import pytest

        @pytest.fixture
        def rollout_batch():
            return 7

        def test(rollout_batch, pytestconfig):
            assert rollout_batch == 7 and pytestconfig.pluginmanager.hasplugin("tokenrl")
            assert not {"torch", "tokenrl", "numpy"} & sys.modules.keys()
        """
    )
    ran(suite).assert_outcomes(passed=1)
