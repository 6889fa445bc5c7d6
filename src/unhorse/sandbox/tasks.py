"""What a restricted process may be asked to do: a closed list, each entry `module:function`.

Such a function takes the open files and the options, and returns a JSON document and a safetensors blob (or
b""). `options["progress"]` takes a line of text that the asking process shows, `options["tier"]` is the tier
of the one that the function runs in.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, BinaryIO

Task = Callable[[list[BinaryIO], dict[str, Any]], tuple[dict[str, Any], bytes]]

TASKS: dict[str, str] = {
    "check": "unhorse.checks.inspection:check_task",
    "contents": "unhorse.checks.archive_contents:contents_task",
    "member": "unhorse.checks.archive_contents:member_task",
    "read": "unhorse.loading.reading:read_task",
    "network": "unhorse.loading.network_reading:network_task",
    "tensors": "unhorse.loading.network_reading:tensors_task",
    "tier": "unhorse.loading.network_reading:tier_task",
}

# imports no torch: the light server imports these before it is asked, and no others
LIGHT = frozenset({"check", "contents", "member"})
