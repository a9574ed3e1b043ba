"""The pages of docs/: no warning, no link that leads nowhere, every public name in the reference."""

import io
import sys

import pytest
from paths import ROOT

sphinx = pytest.importorskip("sphinx.application", reason="sphinx, furo and myst-parser are not installed")
sys.path.insert(0, str(ROOT / "docs"))

pytestmark = [
    pytest.mark.long,
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::PendingDeprecationWarning"),  # Sphinx's own
]


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """All pages read and their references resolved, and what Sphinx warned of; no HTML is written."""
    folder, warnings = tmp_path_factory.mktemp("site"), io.StringIO()
    app = sphinx.Sphinx(
        str(ROOT / "docs"), str(ROOT / "docs"), str(folder), str(folder / "doctrees"), "dummy",
        confoverrides={"nitpicky": True}, status=None, warning=warnings,
    )  # fmt: skip
    app.build()
    return app.env, warnings.getvalue()


def test_the_pages_build_without_a_warning(site):
    assert site[1] == ""


def test_every_public_name_stands_in_the_reference(site):
    from pages import reference

    domain = site[0].domains["py"]
    found, public = {*domain.objects, *domain.modules}, set(reference.public_names())
    assert len(public) > 200 and not sorted(public - found)


def test_no_page_is_empty(site):
    from pages import written

    texts = {name: (ROOT / "docs" / f"{name}.md").read_text() for name in site[0].found_docs}
    assert not [name for name, text in texts.items() if len(written(text).split()) < 20 and not name.endswith("index")]
