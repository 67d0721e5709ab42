"""Encodings and tables of them that several tests use, and strategies for any."""

from __future__ import annotations

from typing import Any

import numerics_reference as reference
from hypothesis import strategies as st

from qat.encoding import Encoding
from qat.encodings import Encodings
from qat.scheme import INT_TYPES, Granularity

UINT8 = Encoding("uint8", (0.5,), (3,), 0, 255)
CHANNELS = Encoding(
    "int8",
    (0.5, 0.25),
    (0, 0),
    -127,
    127,
    True,
    Granularity("per_channel", 0),
    (-1.0, -2.0),
    (63.5, 1.0),
    "qat",
    "lsq",
    64,
)
GROUPS = Encoding(
    "int4", (0.5, 0.25), (-8, 7), -8, 7, granularity=Granularity("per_group", -1, 32), provenance="imported"
)
MIDDLE = Encoding("uint8", (0.5,), (128,), 0, 255, symmetric=True)


@st.composite
def encodings(draw: st.DrawFn) -> Encoding:
    scheme = draw(reference.schemes(tuple(INT_TYPES)))
    qmin, qmax = scheme.code_range
    kind = draw(st.sampled_from(["per_tensor", "per_channel", "per_group"]))
    count = 1 if kind == "per_tensor" else draw(st.integers(1, 4))

    def several(values: st.SearchStrategy[Any]) -> tuple[Any, ...]:
        return tuple(draw(st.lists(values, min_size=count, max_size=count)))

    middle = scheme.symmetric_zero_point
    spans = several(st.tuples(st.floats(allow_nan=False, allow_infinity=False), st.floats(0, 1e300)))
    observed = draw(st.booleans())
    return Encoding(
        dtype=scheme.dtype,
        scale=several(reference.scales),
        zero_point=several(st.just(middle) if scheme.symmetric else st.integers(qmin, qmax)),
        qmin=qmin,
        qmax=qmax,
        symmetric=scheme.symmetric,
        granularity=Granularity(
            kind, draw(st.integers(-4, 3)), draw(st.integers(1, 64)) if kind == "per_group" else None
        ),
        min=tuple(low for low, _ in spans) if observed else None,
        max=tuple(min(low + width, 1.7e308) if low < 1e308 else low for low, width in spans) if observed else None,
        provenance=draw(st.sampled_from(["qat", "ptq", "derived", "fixed", "imported"])),
        method=draw(st.text(max_size=5)),
        samples=draw(st.integers(0, 10**12)),
    )


tables = st.builds(
    Encodings,
    st.dictionaries(st.text(max_size=6), encodings(), max_size=4),
    st.dictionaries(st.text(max_size=4), st.text(max_size=4), max_size=2),
)
