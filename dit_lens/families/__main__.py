"""`python -m dit_lens.families`: the table of docs/families.md, where each family's block differs
from the DiT block.
"""

from __future__ import annotations

from .registry import OURS, family_named


def differences() -> str:
    """The table in Markdown, a line a family."""
    lines = ["| class | where its block differs from the DiT block |", "|---|---|"]
    for name in OURS:
        family = family_named(name)
        assert family is not None
        lines.append(f"| `{name}` | {family.differs} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(differences())
