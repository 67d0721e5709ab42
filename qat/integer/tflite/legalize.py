"""A program of any 8-bit types becomes one of TFLite's int8 operators, or an error says which operator cannot.

The integer model and the exported file both are made of the result, so they take the same steps.
"""

from __future__ import annotations

from dataclasses import replace

from qat.errors import ExportError
from qat.integer.program import Program
from qat.integer.tflite.rewriting import Rewriting
from qat.integer.tflite.rules import RULES


def legalize(program: Program) -> Program:
    """Rewrite a program for the `tflite` profile.

    Args:
        program: As lowering gives it, with int8 or uint8 activations.

    Raises:
        ExportError: A tensor or an operator has no int8 form in TFLite; it is named, with the reason.
    """
    work = Rewriting(program, RULES)
    for op in program.ops:
        work.operator(op)
    for name in program.outputs:
        if name in program.constants or name in program.inputs:
            raise ExportError(f"output {name!r} is not computed: it is a constant or an input", "leave it out")
    read = {name for op in work.ops for name in op.inputs}
    return replace(
        program,
        ops=tuple(work.ops),
        tensors=work.tensors,
        constants={name: c for name, c in work.constants.items() if name in read},
        numerics="tflite",
    )
