"""Pure. Takes secrets out of texts that leave the machine: config files, logs, settings.

Three nets, one behind the other. Values whose name says that they are secret go. Then what looks
like a credential goes, wherever it stands. Then every value goes that is known to be secret here,
because a variable or a file of the config holds it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

LEFT_OUT = "(left out)"
LEAST_SECRET = 6
"""Characters of a known secret that is searched for. A shorter one would be found everywhere."""
_SECRET_WORD = (
    r"[\w.-]*(?:(?<!max_)(?<!output_)(?<!prompt_)(?<!input_)(?:key|token)|secret|password|passwd|"
    r"passphrase|credential|signature|authorization|cookie|connection_string|sas|dsn)s?"
)
_NAMES_ONLY = re.compile(
    r"(?:_env|_file|_path|_name|_id|_per_minute|_tokens|max_\w*)\"?'?[ \t]*:", re.I
)
_SECRET_LINE = re.compile(
    rf"^(?P<indent>[ \t-]*)(?P<key>[\"']?{_SECRET_WORD}[\"']?[ \t]*:)(?P<value>.*)$", re.I
)
_ITEM = re.compile(r"^(?P<indent>[ \t]*)-[ \t]+\S")
_CREDENTIALS = (
    re.compile(r"(?<=://)[^/\s\"']+(?=@)"),
    re.compile(r"\b(?:bearer|basic|apikey|token)[ \t]+[A-Za-z0-9._~+/=-]{6,}", re.I),
    re.compile(r"\b(?:sk|pk|hf|ghp|gho|glpat|xox[abp]|lp)[-_][A-Za-z0-9_-]{8,}"),
    re.compile(r"\b(?:AKIA|ASIA)[A-Z0-9]{12,}\b"),
    re.compile(r"\beyJ[A-Za-z0-9_-]{8,}\.[A-Za-z0-9_-]+\.[A-Za-z0-9_-]*"),
    re.compile(r"-----BEGIN [A-Z ]*PRIVATE KEY-----.*?-----END [A-Z ]*PRIVATE KEY-----", re.S),
)
_QUERY = re.compile(
    r"(?P<name>[?&;](?:X-Amz-(?:Signature|Credential|Security-Token)|sig|signature|token|key|"
    r"access_token|AccountKey|SharedAccessSignature)=)[^&\s\"';]+",
    re.I,
)
_PAIR = re.compile(
    rf"(?P<name>[\"']?\b{_SECRET_WORD}[\"']?[ \t]*[:=][ \t]*)"
    r"(?P<value>\"[^\"]*\"|'[^']*'|[^\s,;}\"']+)",
    re.I,
)


def without_secrets(text: str, known: Iterable[str] = ()) -> str:
    """The text of a config file. Names of variables and of files stay, so that it can be read."""
    return "\n".join(_lines(without_credentials(text, known).split("\n")))


def without_credentials(text: str, known: Iterable[str] = ()) -> str:
    """Any text, without what looks like a credential, and without the `known` secrets."""
    for pattern in _CREDENTIALS:
        text = pattern.sub(LEFT_OUT, text)
    text = _QUERY.sub(rf"\g<name>{LEFT_OUT}", text)
    for secret in sorted({s for s in known if len(s) >= LEAST_SECRET}, key=len, reverse=True):
        text = text.replace(secret, LEFT_OUT)
    return text


def _lines(lines: Iterable[str]) -> Iterable[str]:
    """YAML's lines. What is indented below a secret name belongs to it: a list, or a long text."""
    inside = -1
    for line in lines:
        indent = len(line) - len(line.lstrip(" "))
        if inside >= 0:
            item = _ITEM.match(line)
            if not line.strip() or indent > inside or (item and indent == inside):
                continue
            inside = -1
        found = _SECRET_LINE.match(line)
        if found is None or _NAMES_ONLY.search(line[: found.end("key")]):
            yield _PAIR.sub(_left_out_pair, line)
            continue
        inside = len(found["indent"])
        yield f"{found['indent']}{found['key']} {LEFT_OUT}"


def _left_out_pair(found: re.Match[str]) -> str:
    """A secret within a line, as in `{user: x, password: y}`."""
    if _NAMES_ONLY.search(found["name"].replace("=", ":")) or found["value"].startswith(
        ("null", "~", "(left")
    ):
        return found[0]
    return f"{found['name']}{LEFT_OUT}"
