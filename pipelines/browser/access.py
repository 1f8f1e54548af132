"""Who may compute: whoever has the token that `saeql serve` printed, as a cookie of this browser or in a header.

Reading needs none. Loading a model and running one's own SQL do: every other user of the machine reaches the port.
"""

import secrets
from urllib.parse import urlencode

from starlette.requests import Request
from starlette.responses import RedirectResponse, Response

from .settings import Refused, Settings


def may_compute(request: Request, settings: Settings) -> bool:
    """Whether the request brings the token."""
    scheme, _, given = request.headers.get("authorization", "").partition(" ")
    if scheme.lower() == "bearer":
        return _is(given.strip(), settings)
    return _is(request.cookies.get(settings.cookie, ""), settings)


def require_token(request: Request, settings: Settings) -> None:
    """Raise Refused (401) without it."""
    if not may_compute(request, settings):
        raise Refused(
            401, "this computes, so it needs the token: open the address that `saeql serve` printed, or send "
            "`Authorization: Bearer TOKEN`"
        )  # fmt: skip


def take_token(request: Request, settings: Settings) -> Response | None:
    """For an address with `?token=`: keep it as a cookie, and lead on to the address without it.

    Raises Refused (401) for a wrong one; None where there is none.
    """
    if "token" not in request.query_params:
        return None
    if not _is(request.query_params["token"], settings):
        raise Refused(401, "this is not the token of this server: open the address that `saeql serve` printed")
    rest = urlencode([(k, v) for k, v in request.query_params.multi_items() if k != "token"])
    path = "/" + request.url.path.lstrip("/\\")  # never to another host
    answer = RedirectResponse(path + (f"?{rest}" if rest else ""), status_code=303)
    answer.set_cookie(settings.cookie, settings.token, httponly=True, samesite="strict", path="/")
    return answer


def _is(given: str, settings: Settings) -> bool:
    return secrets.compare_digest(given.encode("utf-8", "replace"), settings.token.encode())
