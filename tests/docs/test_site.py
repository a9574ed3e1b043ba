"""The pages of docs/: they build without a warning, and no link leads nowhere."""

import subprocess
import sys

import pytest
from paths import ROOT

pytestmark = pytest.mark.long


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The folder of the pages, built; a warning of Sphinx is an error."""
    pytest.importorskip("sphinx", reason="sphinx, furo and myst-parser are not installed")
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-n", "-q", str(ROOT / "docs"), str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-6000:]
    return folder


def test_the_pages_build_without_a_warning(site):
    assert (site / "index.html").exists() and len(list((site / "reference").glob("*.html"))) >= 10
