"""Integer operators in pure PyTorch that give the codes ONNX Runtime's CPU provider gives.

Every function takes and returns integer codes (any integer dtype in, int32 out) with their `QParams`. One
family a file:

- `qparams`: scale, zero point and range of one tensor, and exact float32 scalars.
- `accumulate`: exact integer convolutions and products, and the proof that an accumulator cannot overflow.
- `requantize`: quantize, dequantize, and the float32 requantization of accumulators.
- `linear`: convolution, transposed convolution, fully connected, matrix product.
- `elementwise`: addition, subtraction, multiplication, division of two tensors.
- `table`: unary functions as lookup tables, and PReLU.
- `pool`: max, average and global average pooling, mean over axes.
- `normalize`: softmax.
- `layer_norm`: layer normalization.
- `resize`: nearest and linear interpolation.
- `layout`: pad and concatenation.

`docs/onnxruntime.md` says which QDQ pattern each of them stands for, and how exact it is.
"""
