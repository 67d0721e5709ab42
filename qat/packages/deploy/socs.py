"""Qualcomm's SoCs: which Hexagon they have, and how it takes libraries."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

FILE = Path(__file__).with_name("soc.tsv")


@dataclass(frozen=True)
class Soc:
    """A line of `soc.tsv`.

    Attributes:
        soc_id: Number in `/sys/devices/soc0/soc_id`.
        name: Qualcomm's name, `unnamed` where no source has it.
        dsp: Version of the Hexagon, such as `V73`.
        backend: Backend of QNN that serves it: `htp`, `dsp` or `none`.
        domain: Which of the DSPs, `CDSP` or `ADSP`.
        signing: `unsigned`, `try`, `signed`, or `-` where there is no backend.
        source: Where the version was read.
    """

    soc_id: int
    name: str
    dsp: str
    backend: str
    domain: str
    signing: str
    source: str


def read_socs() -> tuple[Soc, ...]:
    """Read the table, in the order of the file."""
    lines = [line for line in FILE.read_text(encoding="ascii").splitlines() if not line.startswith("#")]
    return tuple(Soc(int(number), *rest) for number, *rest in (line.split("\t") for line in lines))


def soc_table() -> str:
    """Return the table in Markdown, SoCs with the same answer in one row."""
    rows = ["| Hexagon | QNN backend | process domain | soc_id (name) |", "| --- | --- | --- | --- |"]
    order = list(dict.fromkeys(soc.dsp for soc in read_socs()))
    by_answer = sorted(read_socs(), key=lambda soc: (order.index(soc.dsp), soc.signing))
    for (dsp, backend, signing), socs in groupby(by_answer, key=lambda soc: (soc.dsp, soc.backend, soc.signing)):
        names = ", ".join(f"{soc.soc_id}" + (f" ({soc.name})" if soc.name != "unnamed" else "") for soc in socs)
        rows.append(f"| {dsp} | {backend} | {signing} | {names} |")
    return "\n".join(rows)


def with_socs(text: str) -> str:
    """Return a page with the table, up to date, between the markers `<!-- socs -->` and `<!-- /socs -->`.

    Raises:
        ValueError: A marker is missing.
    """
    begin, end = "<!-- socs -->\n", "\n<!-- /socs -->"
    before, rest = text.split(begin, 1)
    return before + begin + soc_table() + end + rest.split(end, 1)[1]
