#!/usr/bin/env python
"""Quantization-aware training in your own loop: everything that `qat` adds to it is marked with its number.

    .venv/bin/python scripts/finetune.py                      # scikit-learn's digits, half a minute
    .venv/bin/python scripts/finetune.py --data cifar10 --root FOLDER --weights cifar_resnet20.pth --images 2000

The float model is trained first where no weights are given. At the end there is an ONNX file whose codes were compared
with the simulation in ONNX Runtime.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

import qat
from qat.models import cifar_resnet20, digits_cnn
from qat.train.checkpoint import load_weights
from qat.train.data import DataSpec, InputSpec, Split, load_data

IMAGENET = InputSpec(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))


def loaders(args: argparse.Namespace) -> tuple[DataLoader[tuple[Tensor, ...]], DataLoader[tuple[Tensor, ...]]]:
    """Your own data: any loaders of batches (images, labels)."""
    normal = IMAGENET if args.data == "cifar10" else InputSpec()
    data = load_data(DataSpec(args.data, args.root, input=normal, limit={"train": args.images, "test": args.images}))

    def loader(split: Split | None, shuffle: bool) -> DataLoader[tuple[Tensor, ...]]:
        assert split is not None
        x, y = (torch.cat(part) for part in zip(*split, strict=True))
        return DataLoader(TensorDataset(x, y), batch_size=64, shuffle=shuffle, drop_last=shuffle)

    return loader(data.train, shuffle=True), loader(data.test, shuffle=False)


def train(model: nn.Module, batches: DataLoader[tuple[Tensor, ...]], epochs: int, lr: float, name: str) -> None:
    """Your own loop; nothing in it knows of quantization but the two lines with a number."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * len(batches))
    for epoch in range(epochs):
        model.train()
        if isinstance(model, qat.PreparedModel) and epoch == epochs - 1:
            model.set_phase("quantize")  # 4. for the last epoch ranges stand still ...
            model.freeze_batch_norm()  # ... and so do the statistics of batch norms
        total = 0.0
        for x, y in batches:
            loss = functional.cross_entropy(model(x), y, label_smoothing=0.1)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            total += loss.item()
        print(f"{name} epoch {epoch + 1}/{epochs}: loss {total / len(batches):.4f}")


@torch.no_grad()
def accuracy(model: nn.Module, batches: DataLoader[tuple[Tensor, ...]]) -> float:
    """Your own metric."""
    model.eval()
    hits = [(model(x).argmax(1) == y).float() for x, y in batches]
    return float(torch.cat(hits).mean())


def main(argv: list[str] | None = None) -> None:
    """Train, quantize, train on, export."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", choices=["digits", "cifar10"], default="digits")
    parser.add_argument("--root", type=Path, help="folder of CIFAR-10")
    parser.add_argument("--weights", type=Path, help="float weights; without them the float model is trained first")
    parser.add_argument("--images", type=int, default=100_000, help="use at most so many images of each split")
    parser.add_argument("--epochs", type=int, default=3, help="of quantization-aware training")
    parser.add_argument("--float-epochs", type=int, default=15)
    parser.add_argument("--lr", type=float, default=5e-4)
    parser.add_argument("--target", nargs="+", default=["arm-cpu"])
    parser.add_argument("--out", type=Path, default=Path("finetuned.onnx"))
    args = parser.parse_args(argv)

    torch.manual_seed(0)
    train_batches, test_batches = loaders(args)
    model = digits_cnn() if args.data == "digits" else cifar_resnet20()
    if args.weights is not None:
        load_weights(model, args.weights)
    else:
        train(model, train_batches, args.float_epochs, 0.01, "float")
    print(f"float: {100 * accuracy(model, test_batches):.2f} %")

    example = next(iter(test_batches))[0][:2]
    qmodel = qat.prepare(model, example, target=qat.load_target(*args.target))  # 1. a trainable copy
    qat.calibrate(qmodel, train_batches, samples=512)  # 2. ranges from data
    print(f"after calibration: {100 * accuracy(qmodel, test_batches):.2f} %")

    qmodel.set_phase("track")  # 3. from here on ranges follow what training does
    train(qmodel, train_batches, args.epochs, args.lr, "quantized")
    qmodel.set_phase("quantize")
    print(f"after training: {100 * accuracy(qmodel, test_batches):.2f} %")

    result = qat.export_onnx(qmodel.eval(), args.out)  # 5. written, executed, compared; raises if it differs
    print(f"{args.out}: {result.verification}")


if __name__ == "__main__":
    main()
