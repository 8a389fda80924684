"""Markdown that GitHub takes: what is too long is cut at a line, and says so."""

from collections.abc import Sequence

LIMIT = 65_536  # of a comment, in characters; counted in bytes here, which are no fewer
_RESERVE = 400  # for the fold and the notes on what was cut


def fit_markdown(parts: Sequence[str], details: Sequence[str], *, limit: int = LIMIT) -> str:
    """Blocks of Markdown, then others behind a fold, within a limit.

    Args:
        parts: what everybody should read, most important first.
        details: what stands behind the fold; none for no fold.
        limit: size in UTF-8 bytes, far above that of the notes on what was cut.
    """
    left = limit - _RESERVE
    shown, left = _take(parts, left)
    folded, _ = _take(details, left)
    if folded:
        shown += ["<details><summary>Details</summary>", *folded, "</details>"]
    return "\n\n".join(shown) + "\n"


def _take(blocks: Sequence[str], left: int) -> tuple[list[str], int]:
    """As many blocks as fit; the first that does not is cut at a line, and those after it are left out."""
    taken: list[str] = []
    for block in blocks:
        size = _size(block) + 2
        if size > left:
            kept = _cut(block, left)
            return [*taken, *kept, "*Cut here to what a comment can hold; the HTML and JSON reports have it all.*"], 0
        taken.append(block)
        left -= size
    return taken, left


def _cut(block: str, left: int) -> list[str]:
    """The first lines of a block; nothing where these would be a table without rows."""
    lines: list[str] = []
    for line in block.splitlines():
        left -= _size(line) + 1
        if left < 2:
            break
        lines.append(line)
    is_head_only = len(lines) <= 2 and block.startswith("|")
    return [] if is_head_only or not lines else ["\n".join(lines)]


def _size(text: str) -> int:
    return len(text.encode())
