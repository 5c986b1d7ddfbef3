"""Pure. The fields of a multipart/form-data body that the gateway reads: audio paths send one."""

from __future__ import annotations

import re

from shared.errors import InvalidRequest

_BOUNDARY = re.compile(r"""boundary=(?:"([^"]{1,200})"|([^\s;"]{1,200}))""", re.IGNORECASE)
_NAME = re.compile(rb"""[;\s]name=(?:"([^"]*)"|([^\s;"]+))""", re.IGNORECASE)
MAX_FORM_PARTS = 64
MAX_FORM_VALUE_BYTES = 1024
"""Of a field that is read here; the others are the worker's."""


def form_values(content_type: str, body: bytes) -> dict[str, str]:
    """`model` and `stream`, where they are; files are passed over unread. Raises InvalidRequest."""
    found = _BOUNDARY.search(content_type)
    if found is None:
        raise InvalidRequest("The Content-Type of this request names no boundary.")
    mark = b"--" + (found[1] or found[2]).encode(errors="replace")
    fields: dict[str, str] = {}
    at = 0 if body.startswith(mark) else body.find(b"\r\n" + mark) + 2
    for _ in range(MAX_FORM_PARTS):
        start = at + len(mark) + 2
        end = body.find(b"\r\n" + mark, start)
        if at < 0 or end < 0:
            break
        head, blank, value = body[start : min(end, start + 2 * MAX_FORM_VALUE_BYTES)].partition(
            b"\r\n\r\n"
        )
        name = _NAME.search(head)
        if blank and name is not None and b"filename" not in head.lower():
            key = (name[1] or name[2] or b"").decode(errors="replace")
            if key in ("model", "stream") and len(value) <= MAX_FORM_VALUE_BYTES:
                fields[key] = value.decode(errors="replace").strip()
        at = end + 2
    return fields
