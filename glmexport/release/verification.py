"""Verification of a signed bundle by model-signing; bundles and releases, unknown to it, are checked by the verifier.

The verifier that is shipped asks openssl instead. That both come to the same is tested case by case.
"""

from __future__ import annotations

import contextlib
import io
from pathlib import Path
from typing import Any

from glmexport.foundation.errors import BundleError, InputError, MachineError, UnverifiedError
from glmexport.release import verifier
from glmexport.release.envelope import Envelope
from glmexport.release.keys import missing_library
from glmexport.release.verifier import SIGNATURE, VerifiedBundle

_AGAIN = "Copy the bundle again from where it was signed; if that is no better, do not use it."


def verify(
    bundle: Path,
    key: Path | None = None,
    *,
    root: Path | None = None,
    newer_than: int | None = None,
    subject: str | None = None,
) -> VerifiedBundle:
    """Verify that the bundle is what the owner of the public ``key``, or who has a certificate of ``root``, signed.

    With ``newer_than`` a release whose counter is not above it is refused; with ``subject``, one that was signed by
    another than who is called so (a distinguished name by RFC 4514, or ``email:``, ``DNS:`` or ``URI:`` and a name).

    Raises:
        UnverifiedError: it is not; names the file.
        InputError: the key or the certificate cannot be used.
        MachineError: model-signing is not installed, or a file cannot be read.
    """
    try:
        if not bundle.is_dir():
            raise BundleError(f"There is no bundle {bundle}.", next_step="Give the directory of a bundle.")
        return _verified(bundle.resolve(), key, root, newer_than, subject)
    except verifier.VerificationError as error:
        raise refusal(bundle, error) from error
    except OSError as error:
        raise MachineError(
            f"{error.filename or bundle} cannot be read: {error.strerror}.", next_step="Check permissions and the disk."
        ) from error


def refusal(bundle: Path, error: verifier.VerificationError) -> InputError | UnverifiedError | MachineError:
    """Return the error to raise for what the verifier says of ``bundle``."""
    if error.code == verifier.EXIT_USAGE:
        return InputError(str(error), next_step="Give the public key or the root certificate in PEM.")
    if error.code == verifier.EXIT_MACHINE:
        return MachineError(str(error), next_step="Install openssl, or check the disk.")
    return UnverifiedError(f"{bundle}: {error}", next_step=_AGAIN)


def _verified(
    bundle: Path, key: Path | None, root: Path | None, newer_than: int | None, subject: str | None
) -> VerifiedBundle:
    envelope = verifier.read_envelope(bundle)
    verifier.check_material(envelope, key, root, subject)
    if root:
        # model-signing takes a certificate of any use, and any key.
        verifier.check_certificates(envelope, root, subject)
    verify_model = _model_verifier(envelope, key, root)
    linked = any((bundle / name).is_symlink() for name in verifier.files_in(bundle))
    if linked:
        # What links lead to was looked at; model-signing would refuse all of them.
        verify_model.set_hashing_config(_following_links())
    try:
        # It warns of old signatures on stdout, which is for one JSON document.
        with contextlib.redirect_stdout(io.StringIO()):
            verify_model.verify(bundle, bundle / SIGNATURE)
    except (MemoryError, OSError):
        raise
    except Exception as error:
        if str(error).startswith(("Signature mismatch", "Cannot use")):
            # The signature holds and the files are others: which, and how?
            verifier.check_files(bundle, verifier.signed_files(envelope.payload))
        raise verifier.VerificationError(f"{SIGNATURE} does not hold: {_reason(error)}.") from error
    signed = verifier.signed_files(envelope.payload)
    # Byte for byte they are verified; that no file was overlooked is not left to what the signature says to overlook.
    verifier.check_files(bundle, signed, hashed=False)
    verifier.check_manifest(bundle, signed)
    return verifier.check_release(bundle, signed, newer_than)


def _model_verifier(envelope: Envelope, key: Path | None, root: Path | None) -> Any:
    """Return model-signing's verifier for that key or root; refuse the past forms of signatures that it takes, too."""
    try:
        from cryptography import x509
        from cryptography.exceptions import InvalidSignature
        from cryptography.hazmat.primitives.asymmetric import ec
        from cryptography.hazmat.primitives.serialization import load_pem_public_key
        from model_signing import verifying
        from model_signing._signing.sign_ec_key import get_ec_key_hash
        from model_signing._signing.sign_sigstore_pb import pae
    except ImportError as error:
        raise missing_library(error) from error

    config: Any = verifying.Config
    try:
        if key:
            public = load_pem_public_key(key.read_bytes())
            chosen = None
        else:
            assert root is not None
            chosen = config().use_certificate_verifier(certificate_chain=[root])
    except ValueError as error:
        raise verifier.VerificationError(
            f"{key or root} cannot be read: {_reason(error)}.", verifier.EXIT_USAGE
        ) from error
    if root:
        try:
            public = x509.load_der_x509_certificate(envelope.certificates[0]).public_key()
        except ValueError as error:
            raise verifier.VerificationError(f"{SIGNATURE} has a damaged certificate.") from error
    curves = (ec.SECP256R1, ec.SECP384R1, ec.SECP521R1)
    if not (isinstance(public, ec.EllipticCurvePublicKey) and isinstance(public.curve, curves)):
        raise verifier.VerificationError(f"{SIGNATURE} was made with a key of a kind that is not used here.")
    try:
        public.verify(envelope.signature, pae(envelope.payload), ec.ECDSA(get_ec_key_hash(public)))
    except InvalidSignature as error:
        raise verifier.VerificationError(
            f"{SIGNATURE} does not hold: it was made with another key, or was changed."
        ) from error
    return chosen or config().use_elliptic_key_verifier(public_key=key)


def _following_links() -> Any:
    from model_signing import hashing

    config: Any = hashing.Config
    return config().use_file_serialization(hashing_algorithm="sha256").set_allow_symlinks(True)


def _reason(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__).strip(" .")
