"""How every canonical operator kind is spelled in ONNX, one family a file, each with a table `EMITTERS`."""
