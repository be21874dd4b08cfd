"""Signing keys: a private key, one with a certificate, or a key in a hardware token.

The library model-signing does the signing.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from glmexport.foundation.errors import InputError, MachineError
from glmexport.release.certificates import UnfitCertificate, check_chain, from_pem
from glmexport.release.verifier import SIGNATURE


@dataclass(frozen=True)
class KeyFiles:
    """The signer's material that the user gives: a private key, with or without a chain, or a PKCS#11 URI."""

    private_key: Path | None = None
    certificate: Path | None = None
    chain: tuple[Path, ...] = ()
    pkcs11: str | None = None
    #: Password of an encrypted private key.
    password: str | None = field(default=None, repr=False)


class Signatory:
    """A signer of statements. ``signer`` is model-signing's, ``chain`` has to vouch for its certificate."""

    def __init__(self, signer: Any, kind: str, chain: Sequence[Path] = ()) -> None:
        self._signer = signer
        self._chain = chain
        #: Description of the signer, for people.
        self.kind = kind

    def model_signature(self, name: str, digests: Mapping[str, str]) -> bytes:
        """Return model.sig of the model ``name``, whose files have the SHA-256 ``digests`` by name."""
        from model_signing import manifest
        from model_signing._hashing.hashing import Digest
        from model_signing._signing.signing import Payload

        settings = {"method": "files", "hash_type": "sha256", "allow_symlinks": False, "ignore_paths": [SIGNATURE]}
        serialization = manifest.SerializationType.from_args(settings)
        items = [
            serialization.new_item(path, Digest("sha256", bytes.fromhex(hash_))) for path, hash_ in digests.items()
        ]
        signature = self._signed(Payload(manifest.Manifest(name, items, serialization)))
        return str(signature.bundle.to_json()).encode()

    def envelope(self, predicate_type: str, predicate: Mapping[str, Any], subject: Mapping[str, str]) -> bytes:
        """Return an in-toto statement in a DSSE envelope; ``subject``: SHA-256 by name."""
        from in_toto_attestation.v1.statement import ResourceDescriptor, Statement

        subjects = [ResourceDescriptor(name=name, digest={"sha256": hash_}).pb for name, hash_ in subject.items()]
        statement = Statement(subjects=subjects, predicate_type=predicate_type, predicate=dict(predicate))
        signature = self._signed(_Payload(statement))
        table = json.loads(signature.bundle.to_json())["dsseEnvelope"]
        return (json.dumps(table) + "\n").encode()

    def require_chain(self, signature: Path) -> None:
        """Raise InputError if the chain does not vouch for the certificate that made ``signature``."""
        if not self._chain:
            return
        from model_signing._signing.sign_certificate import Verifier
        from model_signing._signing.sign_sigstore_pb import Signature

        try:
            Verifier(self._chain).verify(Signature.read(signature))
        except (MemoryError, OSError):
            # That the signature cannot be read says nothing about the chain.
            raise
        except Exception as error:
            # Of several libraries, which have no class in common.
            raise InputError(
                f"The chain does not vouch for the certificate, or that is not for signing: {_first(error)}.",
                next_step="Give the certificates above it with --chain, up to the root.",
            ) from error

    def _signed(self, payload: Any) -> Any:
        try:
            return self._signer.sign(payload)
        except MemoryError:
            raise
        except Exception as error:
            # A token is driven by a library of its maker's, whose errors have no class in common with those of others.
            raise MachineError(
                f"The key did not sign: {_first(error)}.", next_step="Check that the key, or its token, is usable."
            ) from error


@dataclass(frozen=True)
class _Payload:
    """The part of a payload that a signer of model-signing reads."""

    statement: Any


def open_signatory(files: KeyFiles) -> Signatory:
    """Load the key, and return what signs with it.

    Raises:
        InputError: a file is missing, is no key for ECDSA on P-256, P-384 or P-521, or not that of the certificate.
        MachineError: model-signing is not installed, or the token does not answer.
    """
    config = _config()
    if files.pkcs11:
        return _pkcs11(config, files.pkcs11)
    if files.private_key is None:
        raise InputError("There is nothing to sign with.", next_step="Give --key or --pkcs11.")
    for path in (files.private_key, files.certificate, *files.chain):
        if path is not None and not path.is_file():
            raise InputError(f"There is no file {path}.", next_step="Give keys and certificates in PEM.")
    try:
        if files.certificate is None:
            password = files.password.encode() if files.password is not None else None
            config.use_elliptic_key_signer(private_key=files.private_key, password=password)
            return Signatory(config._signer, "key")
        _check_certificates(files.certificate, files.chain)
        config.use_certificate_signer(
            private_key=files.private_key, signing_certificate=files.certificate, certificate_chain=files.chain
        )
        return Signatory(config._signer, "certificate", files.chain)
    except (ValueError, TypeError, AttributeError) as error:
        what = f"{files.private_key} and {files.certificate}" if files.certificate else str(files.private_key)
        raise InputError(
            f"{what} cannot sign: {_first(error)}.",
            next_step="Give a private key in PEM on the curve P-256, P-384 or P-521 (README, 'Sign, verify, carry').",
        ) from error


def _check_certificates(certificate: Path, chain: Sequence[Path]) -> None:
    """Raise InputError unless these may sign releases, as far as they say themselves."""
    try:
        above = [each for path in chain for each in from_pem(path.read_bytes())]
        check_chain([*from_pem(certificate.read_bytes())[:1], *above], (), None)
    except UnfitCertificate as error:
        raise InputError(
            f"{certificate} cannot sign releases: {error}.",
            next_step="Have a certificate for signing code issued (README, 'Sign, verify, carry').",
        ) from error


def _pkcs11(config: Any, uri: str) -> Signatory:
    try:
        config.use_pkcs11_signer(pkcs11_uri=uri)
        return Signatory(config._signer, "PKCS#11 token")
    except (RuntimeError, ImportError) as error:
        raise MachineError(
            "Keys in hardware tokens need the library PyKCS11.", next_step="pip install 'glmexport[pkcs11]'"
        ) from error
    except MemoryError:
        raise
    except Exception as error:
        # PyKCS11's own errors have no base class but this.
        raise InputError(
            f"The token cannot sign by that URI: {_first(error)}.",
            next_step="Give a URI of RFC 7512 with the token, the object, module-path and pin-source or pin-value.",
        ) from error


def _config() -> Any:
    try:
        from model_signing.signing import Config
    except ImportError as error:
        raise missing_library(error) from error
    config: Any = Config
    return config()


def missing_library(error: ImportError) -> MachineError:
    """Return the error for model-signing, or something that it imports, not being installed."""
    return MachineError(f"Signatures need {error.name}.", next_step="pip install 'glmexport[sign]'")


def _first(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__).rstrip(".")
