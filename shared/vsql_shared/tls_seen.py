"""What a TLS server shows whoever connects: version, cipher, certificate; and certificates in files.

Not here: the connections that carry something, and judging why one fails (tls.py). Rules: a handshake of our
own, nothing is sent but the handshake; certificates are written down whether they verify or not, beside what
is wrong with them, and a malformed one as such; our client certificate is shown only to servers that verify;
private keys are never read, also where they lie in the same file.
"""

from __future__ import annotations

import hashlib
import socket
import ssl
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import dsa, ec, rsa

from vsql_shared import tls

_MAX_FILE = 4 << 20


def server(host: str, port: int, means: tls.Means, preface: bytes = b"") -> dict[str, Any]:
    """What a handshake with a server gives. Raises OSError where nobody answers or speaks TLS."""
    fault = tls.refusal(host, port, means, preface)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    if fault is None:  # this handshake verifies, too: nobody else can be in its place meanwhile
        if means.ca is not None:
            context.load_verify_locations(means.ca)
        else:
            context.load_default_certs()
        if means.certificate is not None:
            context.load_cert_chain(means.certificate, means.key, password="")
    else:
        # Written down, not believed: whether it verifies is said beside it.
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    with socket.create_connection((host, port), tls.TIMEOUT_SECONDS) as raw:
        if preface:
            raw.sendall(preface)
            if raw.recv(1) != b"S":
                return {"host": host, "port": port, "tls": False}
        with context.wrap_socket(raw, server_hostname=host) as secured:
            cipher, version = secured.cipher(), secured.version()
            encoded = secured.getpeercert(binary_form=True)
    return {
        "host": host,
        "port": port,
        "tls": True,
        "version": version,
        "cipher": cipher[0] if cipher else None,
        "cipher_bits": cipher[2] if cipher else None,
        "certificate": parsed(encoded) if encoded else None,
        "verifies": fault is None,
        "fault": fault.text if fault else None,
    }


def parsed(encoded: bytes) -> dict[str, Any]:
    """Whatever a server gave: a malformed certificate is told, and ends nothing."""
    try:
        return describe(x509.load_der_x509_certificate(encoded))
    except Exception as error:  # noqa: BLE001 - of the parser's, of which not all are documented
        fingerprint = hashlib.sha256(encoded).hexdigest()
        return {"not_read": f"malformed: {type(error).__name__}", "sha256": fingerprint}


def file(path: Path) -> list[dict[str, Any]]:
    """The certificates in a PEM file. Raises OSError, ValueError."""
    with path.open("rb") as opened:
        raw = opened.read(_MAX_FILE)
    found = x509.load_pem_x509_certificates(raw)
    return [parsed(one.public_bytes(serialization.Encoding.DER)) for one in found]


def describe(certificate: x509.Certificate) -> dict[str, Any]:
    """A certificate for people and programs."""
    algorithm = certificate.signature_hash_algorithm
    return {
        "subject": certificate.subject.rfc4514_string(),
        "issuer": certificate.issuer.rfc4514_string(),
        "serial": f"{certificate.serial_number:x}",
        "not_before": certificate.not_valid_before_utc.isoformat(),
        "not_after": certificate.not_valid_after_utc.isoformat(),
        "names": _names(certificate),
        "key": _key(certificate),
        "signed_with": algorithm.name if algorithm else certificate.signature_algorithm_oid.dotted_string,
        "sha256": certificate.fingerprint(hashes.SHA256()).hex(),
    }


def _names(certificate: x509.Certificate) -> list[str]:
    try:
        found = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except (x509.ExtensionNotFound, ValueError):
        return []
    return [str(one.value) for one in found]


def _key(certificate: x509.Certificate) -> str:
    """Algorithm and size."""
    try:
        key = certificate.public_key()
    except (ValueError, UnsupportedAlgorithm):
        return "unknown"
    if isinstance(key, rsa.RSAPublicKey | dsa.DSAPublicKey):
        return f"{'RSA' if isinstance(key, rsa.RSAPublicKey) else 'DSA'} {key.key_size}"
    if isinstance(key, ec.EllipticCurvePublicKey):
        return f"EC {key.curve.name}"
    return type(key).__name__.strip("_").removesuffix("PublicKey")
