"""Recognition of canonical operators, one family of torch calls a file.

Every family exports up to three plain tables: `MODULES` (module class to function), `FUNCTIONS` (torch
function to function) and `METHODS` (name of a Tensor method to function). A function takes the `Site` and
then the arguments of the call under torch's own names and defaults (`input` is called `x`, `axis` is called
`dim`), and returns the `Operator` or raises `NotCanonical` with the cause.
"""
