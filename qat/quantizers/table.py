"""The table of quantizers, for the documentation."""

from __future__ import annotations

from qat.quantizers.registry import QUANTIZER_ALIASES, QUANTIZERS


def quantizers_table() -> str:
    """Return a Markdown table of every quantizer: its names, what it is for and learns, options and source."""
    rows = [("Name", "For", "How the grid comes about", "Options (default)", "Source"), ("---",) * 5]
    for name, kind in QUANTIZERS.items():
        names = [f"`{name}`", *(f"`{alias}`" for alias, spec in QUANTIZER_ALIASES.items() if spec.name == name)]
        options = [
            f"`{key}` ({str(option.default).lower()}): {option.about}; {option.describe()}"
            for key, option in kind.OPTIONS.items()
        ]
        rows.append(
            (
                ", ".join(names),
                ", ".join(f"{r}s" for r in kind.roles),
                kind.about,
                "<br>".join(options) or "-",
                kind.source,
            )
        )
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def with_table(text: str) -> str:
    """Return a page with the table, up to date, between its markers `<!-- quantizers -->` and `<!-- /quantizers -->`.

    Raises:
        ValueError: A marker is missing.
    """
    begin, end = "<!-- quantizers -->\n", "\n<!-- /quantizers -->"
    before, rest = text.split(begin, 1)
    return before + begin + quantizers_table() + end + rest.split(end, 1)[1]
