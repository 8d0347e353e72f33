"""A hash at the end of a file, since runtimes take flipped bytes among the weights for weights, and end the process for
some files that are none of theirs. Imports no torch."""

from __future__ import annotations

from hashlib import sha256

from cet.deploy.description import ExportError

SEAL = "cet.sha256"
"""The hash's name, which stands before it: how many bytes come before the seal, and their hash."""

PLAIN = f"{SEAL}:".encode()
"""Before the seal of formats whose readers look at nothing behind what they know."""

_DIGITS = 12
VALUE_BYTES = _DIGITS + len(":") + 2 * sha256().digest_size
SEAL_BYTES = len(PLAIN) + VALUE_BYTES
"""Of a plain seal."""


def sealed(content: bytes, before: bytes = PLAIN) -> bytes:
    """A file with its seal.

    Args:
        content: of the file.
        before: what the format has stand between it and the seal.
    """
    return content + _seal(content, before)


def check_sealed(content: bytes, path: str) -> None:
    """Refuse a file that is not as it was written, with a plain seal.

    Raises:
        ExportError: then, naming ``path``.
    """
    at = max(len(content) - SEAL_BYTES, 0)
    if not content[at:].startswith(PLAIN):
        raise ExportError(
            f"{path} does not end as files of cet.export do: it is another's, was edited, or its end is missing; "
            "export it again"
        )
    if _seal(memoryview(content)[:at], PLAIN) != content[at:]:
        raise ExportError(f"{path} is damaged: its bytes are not those that were written; export it again")


def check_unless_edited(content: memoryview, path: str, before: bytes) -> None:
    """Refuse a sealed file whose bytes have changed while their number has not: a tool that edits models changes that
    too, or writes its own metadata behind.

    Raises:
        ExportError: then, naming ``path``.
    """
    size = len(content) - len(before) - VALUE_BYTES
    if size < 0:
        return
    found = bytes(content[size:])
    if not found.startswith(before + f"{size:0{_DIGITS}}:".encode()):
        return
    with content[:size] as body:
        if _seal(body, before) != found:
            raise ExportError(
                f"{path} is damaged: its bytes are not those that were written; export it again, or remove its "
                f"metadata {SEAL!r} where it was edited on purpose"
            )


def _seal(content: bytes | memoryview, before: bytes) -> bytes:
    return before + f"{len(content):0{_DIGITS}}:{sha256(content).hexdigest()}".encode()
