"""Why a TLS connection is refused, in words: asked of the server itself, by a handshake of our own.

Not here: the connections that carry something; libpq and librdkafka make those, and say "certificate verify
failed" whatever the cause is. Rules: called only after such a failure, never to decide whether to connect;
sends nothing but the handshake; says nothing that was read from the other side but its certificate's fault.
"""

from __future__ import annotations

import re
import socket
import ssl
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

from cryptography import x509

TIMEOUT_SECONDS = 5.0
# PostgreSQL's SSLRequest: length 8, code 80877103; the server answers S or N.
POSTGRES = bytes.fromhex("0000000804d2162f")


@dataclass(frozen=True, slots=True)
class Means:
    """The files of one side of a connection; None: the system's authorities, no certificate of our own."""

    ca: Path | None = None
    certificate: Path | None = None
    key: Path | None = None


class Reason(NamedTuple):
    """What is wrong, and what to do."""

    text: str
    hint: str


# What OpenSSL says, and what to do about it.
_HINTS = (
    ("expired", "renew the server's certificate"),
    ("not yet valid", "check the clocks of both machines"),
    ("mismatch", "use a host name the certificate has, or have one made with this name"),
    ("doesn't match|not valid for", "use a host name the certificate has, or have one made with this name"),
    ("self-signed|issuer|unable to get", "the CA file must hold the certificate of who signed the server's"),
    ("version|protocol|no cipher|handshake failure", "the server must offer TLS 1.2 or later"),
    ("eof", "the server may not have TLS at this port"),
    ("alert", "the server refuses this side's certificate: check it and its key"),
)


def refusal(host: str, port: int, means: Means, preface: bytes = b"") -> Reason | None:
    """Why a handshake with a server fails; None when it does not, or nobody answers."""
    own = _own_fault(means)
    if own is not None:
        return own
    try:
        context = ssl.create_default_context(cafile=str(means.ca) if means.ca else None)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        if means.certificate is not None:
            # An encrypted key is no reason to ask at the terminal for its passphrase.
            context.load_cert_chain(means.certificate, means.key, password="")
    except (OSError, ValueError):
        return Reason("the files of this side cannot be used", "check the paths of CA, certificate and key")
    try:
        return _handshake(host, port, context, preface)
    except ssl.SSLCertVerificationError as error:
        return _reason(f"the server's certificate is refused: {error.verify_message}")
    except ssl.SSLError as error:
        return _reason(f"the handshake fails: {(error.reason or 'no reason').lower().replace('_', ' ')}")
    except OSError:
        return None


def spoken(host: str, port: int) -> bool:
    """Whether a server speaks TLS at all, to tell a client in clear text why nobody answers it."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    # Nothing is sent and nothing believed: any certificate will do to see that there is one.
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    try:
        with (
            socket.create_connection((host, port), TIMEOUT_SECONDS) as raw,
            context.wrap_socket(raw, server_hostname=host),
        ):
            return True
    except ssl.SSLError as error:
        return "ALERT" in (error.reason or "")
    except OSError:
        return False


def _handshake(host: str, port: int, context: ssl.SSLContext, preface: bytes) -> Reason | None:
    with socket.create_connection((host, port), TIMEOUT_SECONDS) as raw:
        if preface:
            raw.sendall(preface)
            if raw.recv(1) != b"S":
                return Reason("the server does not offer TLS", "switch TLS on at the server")
        with context.wrap_socket(raw, server_hostname=host) as secured:
            # In TLS 1.3 a server judges our certificate after our side of the handshake has ended.
            secured.settimeout(1.0)
            try:
                secured.recv(1)
            except TimeoutError:
                return None
    return None


def _own_fault(means: Means) -> Reason | None:
    """What is wrong with our own certificate, which a server may not say."""
    if means.certificate is None:
        return None
    try:
        certificate = x509.load_pem_x509_certificate(means.certificate.read_bytes())
    except (OSError, ValueError):
        return Reason(f"{means.certificate} holds no certificate in PEM form", "check the path")
    now, ends = datetime.now(UTC), certificate.not_valid_after_utc
    if now > ends:
        return Reason(
            f"this side's certificate {means.certificate} expired at {ends.isoformat(sep=' ')}", "renew it"
        )
    if now < certificate.not_valid_before_utc:
        return Reason(
            f"this side's certificate {means.certificate} is not valid before"
            f" {certificate.not_valid_before_utc.isoformat(sep=' ')}",
            "check this machine's clock",
        )
    return None


def _reason(text: str) -> Reason:
    hint = next((say for pattern, say in _HINTS if re.search(pattern, text, re.IGNORECASE)), "")
    return Reason(text, hint or "check the CA file, and the server's certificate")
