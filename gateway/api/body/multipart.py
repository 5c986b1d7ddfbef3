"""Pure. The fields of a multipart/form-data body that the gateway reads: those of audio paths, and
an uploaded file.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from shared.errors import InvalidRequest

_BOUNDARY = re.compile(r"""boundary=(?:"([^"]{1,200})"|([^\s;"]{1,200}))""", re.IGNORECASE)
_NAME = re.compile(rb"""[;\s]name=(?:"([^"]*)"|([^\s;"]+))""", re.IGNORECASE)
_FILENAME = re.compile(rb'''[;\s]filename="([^"]*)"''', re.IGNORECASE)
MAX_FILENAME = 255
MAX_FORM_PARTS = 64
MAX_FORM_VALUE_BYTES = 1024
"""The longest value of a field that is read here. The worker reads the other fields."""
READ = ("max_completion_tokens", "model", "stream")


def _mark(content_type: str) -> bytes:
    """What stands before each part. Raises InvalidRequest."""
    found = _BOUNDARY.search(content_type)
    if found is None:
        raise InvalidRequest("The Content-Type of this request names no boundary.")
    return b"--" + (found[1] or found[2]).encode(errors="replace")


def form_with(content_type: str, body: bytes, fields: Mapping[str, int]) -> bytes:
    """The form with these fields before its own. Raises InvalidRequest."""
    mark = _mark(content_type)
    more = b"".join(
        b'%b\r\nContent-Disposition: form-data; name="%b"\r\n\r\n%d\r\n'
        % (mark, name.encode(), value)
        for name, value in fields.items()
    )
    at = 0 if body.startswith(mark) else body.find(b"\r\n" + mark) + 2
    return more + body[at:]


def form_values(content_type: str, body: bytes) -> dict[str, str]:
    """The fields READ, as far as the body has them. Files are skipped. Raises
    InvalidRequest, also where one of them may have been missed: another model would answer.
    """
    mark = _mark(content_type)
    fields: dict[str, str] = {}
    at = 0 if body.startswith(mark) else body.find(b"\r\n" + mark) + 2
    for _ in range(MAX_FORM_PARTS + 1):
        start = at + len(mark) + 2
        end = body.find(b"\r\n" + mark, start)
        if at < 0 or end < 0:
            break
        head, blank, value = body[start : min(end, start + 2 * MAX_FORM_VALUE_BYTES)].partition(
            b"\r\n\r\n"
        )
        name = _NAME.search(head)
        if name is not None and b"filename" not in head.lower():
            key = (name[1] or name[2] or b"").decode(errors="replace")
            if key in READ:
                if not blank or len(value) > MAX_FORM_VALUE_BYTES:
                    text = f"`{key}` must have at most {MAX_FORM_VALUE_BYTES} bytes."
                    raise InvalidRequest(text, param=key)
                fields[key] = value.decode(errors="replace").strip()
        at = end + 2
    else:
        raise InvalidRequest(f"The form has more than {MAX_FORM_PARTS} parts.")
    return fields


@dataclass(frozen=True, slots=True)
class UploadedFile:
    """A form with one file: the file's name and bytes, and the other fields."""

    filename: str
    data: bytes
    fields: dict[str, str]


def form_file(content_type: str, body: bytes) -> UploadedFile:
    """The field `file` of a form. Raises InvalidRequest."""
    if not content_type.lower().startswith("multipart/form-data"):
        raise InvalidRequest("The Content-Type of this request must be multipart/form-data.")
    mark = b"\r\n" + _mark(content_type)
    fields: dict[str, str] = {}
    file: tuple[str, bytes] | None = None
    for part in (b"\r\n" + body).split(mark, MAX_FORM_PARTS + 1)[1 : MAX_FORM_PARTS + 1]:
        head, blank, value = part.partition(b"\r\n\r\n")
        filename = _FILENAME.search(head)
        name = _NAME.search(_FILENAME.sub(b"", head))
        if not blank or name is None:
            continue
        key = (name[1] or name[2] or b"").decode(errors="replace")
        if key == "file":
            named = (filename[1] if filename else b"").decode(errors="replace")
            file = named[:MAX_FILENAME] or "file.jsonl", value
        elif len(value) <= MAX_FORM_VALUE_BYTES:
            fields[key] = value.decode(errors="replace").strip()
    if file is None:
        raise InvalidRequest("The form has no field `file`.", param="file")
    return UploadedFile(*file, fields)
