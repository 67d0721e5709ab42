"""Integer operators that give the codes TensorFlow Lite's (LiteRT's) reference kernels give, and the way to them.

Every tensor is int8 with one scale and all 256 codes; weights are int8 with zero point 0. One family a file:

- `arithmetic`: quantize, fixed-point multiplication, gemmlowp's exponential and reciprocal.
- `products`: convolution, transposed convolution, fully connected, matrix product.
- `elementwise`: addition, subtraction, multiplication, PReLU, clamping.
- `reduce`: average pooling, mean.
- `functions`: functions of one tensor as tables of 256 codes.
- `softmax`, `resize`: what their names say.
- `operators`: all of them by canonical kind.
- `legalize`: a program for any 8-bit types becomes one of these operators only, or an error says why not; `rules` has
  what is done with each kind, `rewriting` the program meanwhile, `signed` its tensors as int8.

`docs/tflite.md` says which TFLite operator each of them is, and where the arithmetic is from.
"""
