"""What MediaTek's compiler plug-in makes of a `.tflite` file, seen through a stand-in for its adapter library.

LiteRT's wheel has MediaTek's compiler plug-in, which turns a `.tflite` operator by operator into the operations of
NeuroPilot's library `libneuron_adapter.so`, which it has not. A stand-in for that library takes every call and writes
it down.

- `stand_in.c`: the library; `library`: its compilation, at need.
- `plugin`: MediaTek's plug-in, run by LiteRT's own tool.
- `record`: what was written down.
- `compare`: the record beside the file.
"""
