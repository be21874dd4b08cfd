"""Releases: a bundle is signed with what is known of it, verified where it arrives, packed and carried."""

from glmexport.release.golden import GOLDEN, Golden, GoldenAnswer, GoldenStep, compare, record
from glmexport.release.keys import KeyFiles, Signatory, open_signatory
from glmexport.release.opening import NOBODY, Trust, check_bundle, check_signature, check_signed_file, open_signed
from glmexport.release.release import Release, read_release
from glmexport.release.signing import Signed, sign
from glmexport.release.verification import verify
from glmexport.release.verifier import Verified

__all__ = [
    "GOLDEN",
    "NOBODY",
    "Golden",
    "GoldenAnswer",
    "GoldenStep",
    "KeyFiles",
    "Release",
    "Signatory",
    "Signed",
    "Trust",
    "Verified",
    "check_bundle",
    "check_signature",
    "check_signed_file",
    "compare",
    "open_signatory",
    "open_signed",
    "read_release",
    "record",
    "sign",
    "verify",
]
