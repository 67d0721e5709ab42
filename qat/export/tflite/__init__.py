"""A program of the `tflite` profile as a `.tflite` file, executed in LiteRT and compared code by code.

- `schema`: the optional libraries.
- `builder`: tensors, buffers, operators, and their bytes.
- `context`: where each value of the program lives in the file, and in which order of dimensions.
- `emitters/`: one family of operators a file.
- `writer`: the whole program.
- `runtime`, `verify`: execution and comparison.
- `model`: `export_tflite`.
"""
