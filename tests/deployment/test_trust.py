"""Whom a server trusts: a key, or a root and who has to have been certified by it."""

from __future__ import annotations

from pathlib import Path

import pytest
from signatures import Authority, Pair

from glmexport.bundle.bundle import Bundle
from glmexport.deployment.signed import SignedBundle
from glmexport.deployment.site import open_site
from glmexport.foundation.errors import DefinitionError, InputError, UnverifiedError
from glmexport.foundation.progress import Silent
from glmexport.release.keys import KeyFiles, open_signatory
from glmexport.wire.server.verifying import verify_release
from glmexport.wire.standalone import Failure
from glmexport.workflows.sign import sign_bundle

SITE = 'trust = "{trust}"\nsubject = "{subject}"\n[servers.a]\nat = "ssh://x"\n'


@pytest.mark.parametrize("subject,legal", [("CN=leaf", True), ("CN=middle", False)])
def test_a_site_s_subject_is_who_signs(
    subject: str, legal: bool, release: Path, authority: Authority, tmp_path: Path
) -> None:
    """Here, and on the server, which has it beside the root."""
    files = KeyFiles(authority.key, authority.certificate, (authority.intermediate, authority.root))
    sign_bundle(Bundle.open(release), open_signatory(files), counter=8, golden=False, progress=Silent())
    path, kept = tmp_path / "site.toml", tmp_path / "trust.pem"
    path.write_text(SITE.format(trust=authority.root, subject=subject))
    site = open_site(path)
    kept.write_text(site.trusted())
    if legal:
        assert SignedBundle.open(release, authority.root, Silent(), site.subject).counter == 8
        assert verify_release(release, kept).counter == 8
        return
    with pytest.raises(UnverifiedError, match="CN=leaf"):
        SignedBundle.open(release, authority.root, Silent(), site.subject)
    with pytest.raises(Failure, match="CN=leaf"):
        verify_release(release, kept)


def test_a_subject_needs_a_root_and_one_line(authority: Authority, keys: Pair, tmp_path: Path) -> None:
    path = tmp_path / "site.toml"
    path.write_text(SITE.format(trust=keys.public, subject="CN=leaf"))
    with pytest.raises(InputError, match="no root certificate"):
        open_site(path).trusted()
    path.write_text(SITE.format(trust=authority.root, subject="CN=leaf\\n"))
    with pytest.raises(DefinitionError, match="one line"):
        open_site(path)
