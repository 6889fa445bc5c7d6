"""Text beside the weights that reads like code, a script or an address: quoted, never acted on."""

from __future__ import annotations

import re
from collections.abc import Mapping

MAX_LENGTH, MAX_QUOTES = 120, 3
_OWN = {"unhorse"}
_SIGNS: dict[str, re.Pattern[str]] = {
    "a script": re.compile(
        r"<\s*(script|iframe|object|embed|svg|img)\b|javascript:|\bon(error|load)\s*=", re.I
    ),
    "code": re.compile(
        r"__\w+__|\b(eval|exec|compile|getattr|system|popen|open|loads|b64decode)\s*\(|(^|[;\n'\"])\s*(import\s+[a-z_][\w.]*\s*($|[;\n,]|as\b)|from\s+[\w.]+\s+import\b)"
        r"|\b(os|subprocess|socket|shutil|ctypes|pickle|marshal)\.\w+|\blambda\b[^:]{0,40}:|\bdef\s+\w+\s*\("
        r"|\{\{.{0,200}\}\}|\{%.{0,200}%\}|<%|<\?php|\$\{.{0,80}\}",
        re.DOTALL,
    ),
    "a command": re.compile(
        r"^#!|\b(curl|wget|bash|sh|powershell|cmd(\.exe)?|chmod|nc)\s+[-/\w]|\brm\s+-\w*r|\$\(|`[^`]+`|/bin/\w+|"
        r"\|\s*(ba|z)?sh\b",
        re.I,
    ),
    "an address": re.compile(
        r"\b(https?|ftp|file|s3|gs|smb|ws|wss|ldap|rmi|ssh|git)://|\bdata:\w+/|\\\\\w+\\", re.I
    ),
    "a pickle": re.compile(
        r"\bgA[JNRSW][A-Za-z0-9+/]{8,}|\\x80\\x0[2-5]|^\(?[ci](os|posix|nt|builtins|__builtin__)\n"
    ),
    "control characters": re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\u202a-\u202e\u2066-\u2069]"),
}


def remarks(metadata: Mapping[str, str]) -> tuple[str, ...]:
    """A note on what reads like code, a script or an address, quoted; none where nothing does.

    Keys count like values; the card of unhorse, which is read by rules of its own, does not.
    """
    quotes = []
    for key, value in metadata.items():
        if key in _OWN:
            continue
        for what, pattern in _SIGNS.items():
            if found := pattern.search(value) or pattern.search(key):
                quotes.append(
                    f"{what} under {_quoted(key, found if found.string is key else None)}: "
                    f"{_quoted(value, found if found.string is value else None)}"
                )
                break
    if not quotes:
        return ()
    more = f" and {len(quotes) - MAX_QUOTES} more" if len(quotes) > MAX_QUOTES else ""
    return (f"LD237 metadata reads like more than a description: {'; '.join(quotes[:MAX_QUOTES])}{more}",)


def _quoted(text: str, found: re.Match[str] | None) -> str:
    """A text in ASCII and quotation marks, shortened around what was found in it."""
    start = max(found.start() - MAX_LENGTH // 4, 0) if found else 0
    part = text[start : start + MAX_LENGTH]
    before, behind = "..." * (start > 0), "..." * (start + MAX_LENGTH < len(text))
    return f"{before}{ascii(part)[: 3 * MAX_LENGTH]}{behind}"
