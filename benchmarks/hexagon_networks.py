"""Whole networks on Qualcomm's HTP emulator: the forecast against what it did, and how far it is from the simulation.

    python benchmarks/hexagon_networks.py [NETWORK ...] [--archs 68 73 79] [--size 64] [--images 4] [--operators 73]
        [--activations uint8]

Networks have random weights, with batch norms and ranges from random images. For each network and generation: what the
plan calls integer (operators and MACs), the float tensors that the compiler made, the output's largest difference from
the simulation in codes and the share of equal codes, and, for the generations of `--operators`, the same of every
operator executed alone. Prints a Markdown table; needs `pip install 'qat[hexagon]'`.
"""

from __future__ import annotations

import argparse
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

import qat
from qat.export.htp import htp_session
from qat.integer.model import IntegerModel
from qat.packages.hexagon_runtimes import check_operators
from qat.torchvision import import_torchvision


def _torchvision(name: str) -> Callable[[int], nn.Module]:
    def make(size: int) -> nn.Module:
        model: nn.Module = getattr(import_torchvision("models"), name)(weights=None, num_classes=10)
        return model

    return make


def vit(size: int) -> nn.Module:
    """A small vision transformer whose embeddings are as large as trained ones."""
    model: nn.Module = import_torchvision("models").VisionTransformer(
        image_size=size, patch_size=size // 8, num_layers=4, num_heads=4, hidden_dim=64, mlp_dim=128, num_classes=10
    )
    with torch.no_grad():
        model.class_token.normal_()
        model.encoder.pos_embedding.normal_(std=0.5)
        model.heads.head.weight.normal_(std=0.2)
    return model


NETWORKS: dict[str, Callable[[int], nn.Module]] = {
    **{
        name: _torchvision(name)
        for name in ("mobilenet_v2", "resnet18", "mobilenet_v3_small", "squeezenet1_1", "efficientnet_b0")
    },
    "vit": vit,
}


def on_grid(imodel: IntegerModel, x: Tensor) -> Tensor:
    """The images, rounded to what their codes stand for: the emulator's own quantization is not what is measured."""
    encoding = next(imodel.program.encoding_of(op.outputs[0]) for op in imodel.program.ops if op.kind == "quantize")
    assert encoding is not None
    return encoding.dequantize(encoding.quantize(x))


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser()
    parser.add_argument("networks", nargs="*", default=list(NETWORKS))
    parser.add_argument("--archs", nargs="+", type=int, default=[68, 73, 79])
    parser.add_argument("--operators", nargs="*", type=int, default=[73])
    parser.add_argument("--activations", default="uint8")
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--images", type=int, default=4)
    options = parser.parse_args()
    print("| network | HTP | integer operators | MACs | float tensors | codes | equal | operators alone | seconds |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- | --- |")
    for name in options.networks:
        torch.manual_seed(0)
        model, images = NETWORKS[name](options.size), torch.randn(32, 3, options.size, options.size)
        with torch.no_grad():
            for _ in range(2):
                model.train()(images)
        for arch in options.archs:
            row(name, model.eval(), images, arch, options)


def row(name: str, model: nn.Module, images: Tensor, arch: int, options: argparse.Namespace) -> None:
    """Measure one network on one generation, and print its row."""
    start, target = time.perf_counter(), qat.load_target(f"hexagon-v{arch}")
    scheme = {"activations": {"dtype": options.activations}}
    made = qat.plan(model, images, target=target, scheme=scheme)
    forecast = [made.forecast(entry) for entry in made if made.forecast(entry)]
    with warnings.catch_warnings(), tempfile.TemporaryDirectory() as folder:
        warnings.simplefilter("ignore")
        qmodel = qat.prepare(model, images, target=target, scheme=scheme)
        qat.calibrate(qmodel, [images], progress=False)
        path = Path(folder) / "m.onnx"
        result = qat.export_onnx(qmodel, path, verify=False)
        imodel = qat.convert(qmodel)
        inputs = on_grid(imodel, images[: options.images])
        with htp_session(path, arch) as opened:
            feed = opened.session.get_inputs()[0].name
            found = np.concatenate([opened.session.run(None, {feed: x[None].numpy()})[0] for x in inputs])
            floats = len(opened.graph.floats)
        alone = "" if arch not in options.operators else check_operators(path, {feed: inputs[:1].numpy()}, arch)
    with torch.no_grad():
        apart = np.abs(found - imodel(inputs).numpy()) / result.outputs[0].scale
    print(
        f"| {name} | v{arch} | {forecast.count('integer')} of {len(forecast)} | {100 * made.integer_share:.4g} % "
        f"| {floats} | {apart.max():.0f} | {100 * (apart < 0.5).mean():.0f} % | {alone} "
        f"| {time.perf_counter() - start:.0f} |",
        flush=True,
    )


if __name__ == "__main__":
    main()
