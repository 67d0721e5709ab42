"""What a run prints: the table of results and whether the contract holds."""

from __future__ import annotations

from collections.abc import Mapping

from qat.errors import ExpectationError
from qat.recipe.schema import ExpectPart

#: rows of the table, in order
ROWS = ("float", "PTQ", "QAT", "ONNX Runtime")

Results = Mapping[str, Mapping[str, float]]


def results_table(results: Results) -> str:
    """Return the table of top-1, top-5, loss and number of images."""
    rows = [("", "top-1", "top-5", "loss", "images")]
    for name in ROWS:
        if name in results:
            r = results[name]
            rows.append(
                (name, f"{100 * r['top1']:.2f} %", f"{100 * r['top5']:.2f} %", f"{r['loss']:.4f}", f"{r['n']:.0f}")
            )
    widths = [max(len(row[i]) for row in rows) for i in range(5)]
    return "\n".join(
        "  ".join([row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))]).rstrip()
        for row in rows
    )


def last_quantized(results: Results) -> str | None:
    """Return the row that a contract speaks of: ONNX Runtime, else QAT, else PTQ."""
    return next((name for name in reversed(ROWS) if name in results and name != "float"), None)


def check_expectations(expect: ExpectPart, results: Results, integer_share: float | None) -> str:
    """Check a recipe's contract and return a line that says what was held to.

    Raises:
        ExpectationError: It is not met; what was expected and what was found are named.
    """
    held: list[str] = []
    broken: list[str] = []

    def hold(condition: bool, text: str) -> None:
        (held if condition else broken).append(text)

    name = last_quantized(results)
    if (expect.top1 is not None or expect.max_drop is not None) and name is None:
        raise ExpectationError("the recipe expects a top-1 and nothing was measured", "give labelled test images")
    if expect.top1 is not None and name is not None:
        found, least = results[name]["top1"], expect.top1 - expect.tolerance
        hold(found >= least, f"top-1 of {name} {100 * found:.2f} % (expected {100 * least:.2f} % or more)")
    if expect.max_drop is not None and name is not None:
        if "float" not in results:
            raise ExpectationError("the recipe expects a drop and the float model was not measured", "give test images")
        drop = results["float"]["top1"] - results[name]["top1"]
        hold(
            drop <= expect.max_drop,
            f"drop from float to {name} {100 * drop:.2f} points (expected {100 * expect.max_drop:.2f} or less)",
        )
    if expect.integer_macs is not None:
        share = integer_share or 0.0
        hold(
            share >= expect.integer_macs,
            f"{100 * share:.2f} % of multiply-accumulates integer (expected {100 * expect.integer_macs:.2f} % or more)",
        )
    if broken:
        raise ExpectationError(f"the recipe's contract does not hold: {'; '.join(broken)}")
    return "contract: " + "; ".join(held) if held else ""
