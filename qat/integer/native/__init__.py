"""Programs on the native runner: which operators it has, how a program becomes plan files, and their execution.

- `planfile`: the plan file of `docs/plan_format.md`, from plain records to bytes.
- `support`: which operators of a program the runner has, and the reason for each that it lacks.
- `segments`: the runs of operators that the runner takes over, and what stays in PyTorch between them.
- `order`: the physical order of the dimensions of a tensor, and what reshapes make of it.
- `builder`: a plan while it is written: tensors, constants, and copies to another order.
- `fusion`: which operators become part of the one before.
- `products`, `spatial`, `pointwise`, `moves`: how each kind of operator is written, one family a file.
- `lowering`: a segment becomes a plan.
- `whole`: a whole program becomes one plan file, for devices.
- `execution`: sessions of the runner, and the values that go in and out.
- `profiling`: the time of every operator.
"""
