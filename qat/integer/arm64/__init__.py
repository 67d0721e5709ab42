"""The `onnx-arm64` numerics profile: what ONNX Runtime computes otherwise on 64-bit ARM than on x86.

- `elementwise`: addition in fixed point, multiplication with one rounding.
- `floats`: layer normalization, bilinear interpolation and hard sigmoid, with fused multiply-adds.
- `operators`: the bridge from a program to them; every other operator is the one of the `onnx` profile.
"""
