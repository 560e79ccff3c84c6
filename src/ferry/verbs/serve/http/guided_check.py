"""Whether a schema can be kept, said without an answer being made: for those who are still writing it."""

from __future__ import annotations

from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from ferry.guided.refusal import Refusal
from ferry.guided.request import constraint_of
from ferry.verbs.serve.http.errors import ApiError, wrong
from ferry.verbs.serve.http.events import answer_json
from ferry.verbs.serve.http.reading import read_object
from ferry.verbs.serve.http.served import Served


async def check_schema(served: Served, request: HttpRequest) -> Response:
    """Answer {"ok": true, "notes"}, or {"ok": false, "message", "keyword", "pointer"}, for {"schema": ...}."""
    given = await read_object(request, served.settings.max_body_bytes)
    if given.get("schema") is None:
        raise wrong("schema", "schema is missing", code="request.missing", repair="send it as text or as JSON")
    served.check_open()
    try:
        compiled = await served.compiled(constraint_of({"guided_json": given["schema"]}))
    except (Refusal, ApiError) as error:
        refusal = error if isinstance(error, Refusal) else error.__cause__
        if not isinstance(refusal, Refusal):
            raise
        where = {"keyword": refusal.keyword, "pointer": refusal.pointer}
        return answer_json({"ok": False, "message": str(refusal), "code": refusal.code, **where})
    return answer_json({"ok": True, "notes": list(compiled.notes) if compiled else []})
