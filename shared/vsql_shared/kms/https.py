"""Calls to a service over HTTPS: what key services without an SDK of their own share, and a schema registry.

Not here: what is asked and what the answers mean (azure_kv.py, gcp_kms.py, vault.py;
kafka/schema_registry.py). Rules:

* TLS is verified; a redirect is never followed, because a token goes with each request.
* Throttling (429), failures of the service (500, 502, 503, 504) and lost connections are tried again, a
  bounded number of times with doubling, scattered pauses (Retries); then TransientError. The rest is the
  provider's.
* What is asked may be asked twice: wrapping and unwrapping change nothing at the service, and a schema that
  is registered again is the same one.
* A call has one deadline, however its answer comes: a server that sends a byte now and then holds nobody.
* An answer has at most 1 MiB. Of one that refuses, code and text go into a message, cut and printable;
  never a header, never what was sent.
"""

from __future__ import annotations

import http.client
import json
import re
import secrets
import socket
import ssl
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar
from urllib.parse import urlsplit

from typing_extensions import override

from vsql_shared.config.kms_services import is_loopback
from vsql_shared.errors import DecodeError, EnvironmentFault, KeyUnavailableError, TransientError
from vsql_shared.kms.base import LONGEST_PAUSE, Retries

_T = TypeVar("_T")
_MAX_ANSWER = 1 << 20
_MAX_SHOWN = 200
_BUSY = frozenset({429, 500, 502, 503, 504})


class Request(NamedTuple):
    """One call; `body` is sent as JSON."""

    method: Literal["GET", "POST", "PUT"]
    url: str
    body: Mapping[str, object] | None = None


class Answer(NamedTuple):
    """What came back; `body` is empty where it is no JSON object."""

    status: int
    body: dict[str, Any]
    retry_after: float | None = None


class _Timed(socket.socket):
    """A socket whose reading ends at a moment, not a while after the last byte."""

    by = float("inf")

    @override
    def recv_into(self, *args: Any, **kwargs: Any) -> int:
        self.settimeout(_left(self.by))
        return super().recv_into(*args, **kwargs)


class _TimedTls(ssl.SSLSocket):
    """The same over TLS. A handshake is one call, and ends in time by itself."""

    by = float("inf")

    @override
    def recv_into(self, *args: Any, **kwargs: Any) -> int:
        self.settimeout(_left(self.by))
        return super().recv_into(*args, **kwargs)


def _left(by: float) -> float:
    if (left := by - time.monotonic()) <= 0:
        raise TimeoutError("the answer takes too long")
    return left


class _Connection(http.client.HTTPConnection):
    @override
    def connect(self) -> None:
        by = time.monotonic() + (self.timeout or 0.0)
        super().connect()
        # Made from a bare descriptor it would not wait where it should: a body larger than a buffer fails.
        self.sock = _Timed(fileno=self.sock.detach())
        self.sock.settimeout(self.timeout)
        self.sock.by = by


class _TlsConnection(http.client.HTTPSConnection):
    @override
    def connect(self) -> None:
        by = time.monotonic() + (self.timeout or 0.0)
        super().connect()
        assert isinstance(self.sock, _TimedTls)  # noqa: S101 - the context makes no other
        self.sock.by = by


class _Http(urllib.request.HTTPHandler):
    @override
    def http_open(self, req: urllib.request.Request) -> http.client.HTTPResponse:
        return self.do_open(_Connection, req)


class _HttpOverTls(urllib.request.HTTPSHandler):
    def __init__(self, context: ssl.SSLContext) -> None:
        super().__init__(context=context)
        self._tls = context
        context.sslsocket_class = _TimedTls

    @override
    def https_open(self, req: urllib.request.Request) -> http.client.HTTPResponse:
        return self.do_open(_TlsConnection, req, context=self._tls)


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *_: object) -> None:
        """Follow none; the answer itself is returned."""
        return


def _scattered(seconds: float) -> float:
    """So long and up to a quarter longer: many workers that were throttled do not come back at once."""
    return min(LONGEST_PAUSE, seconds * (1 + secrets.randbelow(256) / 1024))


class Https:
    """Calls to one service. `name` stands in messages."""

    def __init__(
        self,
        name: str,
        url: str,
        retries: Retries,
        ca_path: Path | None = None,
        client: tuple[Path, Path] | None = None,
        fault: type[EnvironmentFault] = KeyUnavailableError,
    ) -> None:
        """`url` is any address of the service, `client` a certificate and its key.

        Raises `fault`, here and later, where an operator must mend something: certificates, trust.
        """
        self._name, self._retries, self._fault = name, retries, fault
        try:
            context = ssl.create_default_context(cafile=ca_path)
        except (OSError, ssl.SSLError) as error:
            raise fault(
                f"{name}: no CA certificates can be read from {ca_path}",
                hint="give a file of PEM certificates",
            ) from error
        if client is not None:
            _present(context, name, client, fault)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        # Proxies are those of the environment, but what goes to this machine goes there.
        proxies = urllib.request.ProxyHandler({} if is_loopback(urlsplit(url).hostname) else None)
        self._open = urllib.request.build_opener(proxies, _NoRedirect(), _Http(), _HttpOverTls(context)).open

    def send(
        self,
        request: Request,
        headers: Mapping[str, str],
        sleep: Callable[[float], None] = time.sleep,
        *,
        final: Callable[[Answer], bool] = lambda _: False,
    ) -> Answer:
        """The service's answer, whatever it says. Raises TransientError; `fault` (TLS).

        `final`: answers that look like a service's failure, and will be the same when asked again.
        """
        problem = "no attempt was allowed"
        for attempt in range(1, self._retries.attempts + 1):
            asked: float | None = None
            try:
                answer = self._once(request, headers)
            except (OSError, http.client.HTTPException, UnicodeError) as error:
                problem = self._lost(error)
            else:
                if answer.status not in _BUSY or final(answer):
                    return answer
                problem, asked = f"it answers {answer.status}{refusal_text(answer)}", answer.retry_after
            if attempt < self._retries.attempts:
                sleep(_scattered(self._retries.pause_after(attempt, asked)))
        raise TransientError(
            f"{self._name} cannot be used now: {problem} ({self._retries.attempts} attempts)",
            hint="it is tried again; if it stays, look at the service's quota and at the way to it",
        )

    def read(
        self, what: str, answer: Answer, parse: Callable[[dict[str, Any]], _T], hint: str, grant: str
    ) -> _T:
        """What `parse` makes of a good answer.

        Raises KeyUnavailableError for any other, with `grant` as its hint where a right is missing.
        """
        if answer.status != 200:
            raise KeyUnavailableError(
                f"{what}: {self._name} answers {answer.status}{refusal_text(answer)}",
                hint=grant if answer.status in {401, 403} else hint,
            )
        try:
            return parse(answer.body)
        except DecodeError as error:
            raise KeyUnavailableError(
                f"{what}: {self._name}: {error.message}",
                hint="see what stands between this node and the service",
            ) from error

    def _once(self, request: Request, headers: Mapping[str, str]) -> Answer:
        data = None if request.body is None else json.dumps(request.body).encode()
        sent = urllib.request.Request(  # noqa: S310  # addresses are https, or this machine's (kms_services)
            request.url, data, {"Content-Type": "application/json", **headers}, method=request.method
        )
        try:
            with self._open(sent, timeout=self._retries.timeout) as answer:
                return _read(answer.status, answer.headers.get("Retry-After"), answer.read(_MAX_ANSWER))
        except urllib.error.HTTPError as error:
            with error:
                return _read(error.code, error.headers.get("Retry-After"), error.read(_MAX_ANSWER))

    def _lost(self, error: Exception) -> str:
        """What became of the connection. Raises `fault` where trying again is of no use."""
        reason = error.reason if isinstance(error, urllib.error.URLError) else error
        if isinstance(reason, UnicodeError | http.client.InvalidURL):
            raise self._fault(
                f"{self._name}: that is no address", hint="write host and path in ASCII, without blanks"
            ) from error
        if isinstance(reason, ssl.SSLCertVerificationError):
            raise self._fault(
                f"{self._name}: the server's certificate is not to be trusted ({reason.verify_message})",
                hint="check the address, and which CA certificates are configured",
            ) from error
        return f"no connection ({type(reason).__name__})"


def _present(
    context: ssl.SSLContext, name: str, client: tuple[Path, Path], fault: type[EnvironmentFault]
) -> None:
    """Show a certificate of ours to a server that asks for one."""
    certificate, key = client
    try:
        # Without a password: a key that needs one is refused, where the library would ask at the terminal.
        context.load_cert_chain(certificate, key, password="")
    except (OSError, ssl.SSLError) as error:
        raise fault(
            f"{name}: {certificate} and {key} are no certificate and its key",
            hint="give PEM files, the key without a password",
        ) from error


def _read(status: int, retry_after: str | None, data: bytes) -> Answer:
    try:
        body = json.loads(data)
    except (ValueError, RecursionError):
        body = {}
    # A date is allowed, too; then our own pauses do.
    seconds = float(retry_after) if retry_after and re.fullmatch(r"[0-9]{1,6}", retry_after) else None
    return Answer(status, body if isinstance(body, dict) else {}, seconds)


def refusal_text(answer: Answer) -> str:
    """` (code: text)` of a refusal, for a message; empty where the service says nothing we know."""
    error = answer.body.get("error")
    if isinstance(error, dict):  # Azure and Google
        found = [error.get("code"), error.get("status"), error.get("message")]
        inner = error.get("innererror")
        found[1:2] = [inner.get("code")] if isinstance(inner, dict) else found[1:2]
    else:  # Vault, or a schema registry
        known = [answer.body.get("message")] if "error_code" in answer.body else None
        errors = answer.body.get("errors", known)
        found = list(errors) if isinstance(errors, list) else []
    text = ": ".join(part for part in found if isinstance(part, str) and part)
    shown = "".join(c if c.isprintable() else " " for c in text)[:_MAX_SHOWN]
    return f" ({shown})" if shown else ""
