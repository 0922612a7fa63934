"""Why torch cannot read a file, in words for people: what torch says itself is of its own insides."""

from __future__ import annotations

import pickletools
import re
from pathlib import Path

_MEND = "get it anew"
_TENSORS = ("torch.", "collections.OrderedDict")  # what tensors are made by, in a pickle that torch.save did not write


def why_unreadable(path: Path, error: Exception) -> str:
    """What a `.pt` file is instead of tensors in torch's format, and the mend.

    Args:
        path: of the file, perhaps of none.
        error: what `torch.load(weights_only=True)` raised.
    """
    if not path.is_file():
        return str(error)
    with path.open("rb") as file:
        head = file.read(80)
    asked = _code_in(path, head, str(error))
    if asked:
        return (
            f"got one that holds code: it asks for {asked}, which is not run; get a file of tensors from its source, "
            "or where you trust it load it yourself and torch.save its state dict"
        )
    if not head:
        return f"got an empty file; {_MEND}"
    if head[:2] == b"PK":
        return f"got a zip that was cut off or altered, or is none of torch's; {_MEND}"
    if head[:1] != b"\x80":  # of every pickle that torch ever wrote
        text = head.splitlines()[0].decode("ascii", "replace")[:60]
        what = f"a text that begins {text!r}" if text.isprintable() and text.isascii() else "a file of another kind"
        return f"got {what}; get the file itself"
    return f"got a pickle that was cut off or altered, or is none of torch's; {_MEND}"


def _code_in(path: Path, head: bytes, said: str) -> str | None:
    """The function or class that a pickle asks for and torch does not know, `module.name`."""
    found = re.search(r"GLOBAL ([\w.]+)", said)
    if found:
        return found[1]
    if head[:1] != b"\x80":
        return None
    texts: list[str] = []  # the last two on the stack name what a newer pickle asks for
    try:
        with path.open("rb") as file:
            for operation, argument, _ in pickletools.genops(file):
                if "UNICODE" in operation.name:
                    texts.append(str(argument))
                if operation.name not in ("GLOBAL", "STACK_GLOBAL"):
                    continue
                name = str(argument).replace(" ", ".") if operation.name == "GLOBAL" else ".".join(texts[-2:])
                if not name.startswith(_TENSORS):
                    return name
    except (ValueError, MemoryError, OverflowError):  # it ends too early, or is no pickle any more
        return None
    return None
