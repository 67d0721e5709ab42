"""Reading target files.

Schema of a target file, version 2 (YAML; `?` marks what may be left out):

    schema: 2
    extends?: <name of a target, or path of a file beside this one>
    name, title, version, numerics (onnx|tflite), dynamic_batch (bool)
    sources?: [texts]
    floats? (float32|float16|none): what computes an operator without integer form; float32
    layout? (NCHW|NHWC): of images in the target's artifacts; NCHW
    mixed_dtypes? (bool): operators may read another activation type than they write; true
    symmetric?: [weights, activations]: those of a signed type have zero point 0
    activations, weights: {dtype, symmetric, granularity, qmin, qmax, observer}
        observer: a name, or {name: ..., <option>: ...}; minmax where it is left out
    dtypes: {<set name>: [[activation dtype, weight dtype], ...], ...}     named sets of legal dtype tuples
    operators: {<kind>: <rule>}
        rule: {dtypes: <set name>, granularity?: [...], output?: own|inherit|tie|fixed, fixed?: ..., limits?: ...,
               modes?: [...], symmetric?: [...], multiplier_below?: number, parameters?: float|quantized,
               apart?: bool},
              or {instead: <text>} for what has no integer form
        fixed: [low, high], or {<activation dtype>: [low, high]}; types that are not named have a range of their own
        limits: {dilation|groups|rank|spatial: largest legal number}
        modes: of resize (nearest, linear), pad (constant, reflect, replicate), clamp (relu, relu6, relu_n1_to_1, other)
        parameters, of prelu and layer_norm: slopes and factors are floats, or 8-bit codes (and offsets int32 codes)
        multiplier_below: the scales of the operands over that of the result; checked when a network is exported
        functions, of table: {<function>: <rule>}; keys that are left out are those of the rule of table

A file that extends another one has its own schema, name, title and version; what else it does not say is that of the
other. Mappings are merged key by key, a key whose value is null is removed, and everything else replaces.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from functools import reduce
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from qat.errors import TargetError
from qat.targets.parse import SEE, make_target
from qat.targets.target import Target

SCHEMA_VERSION = 2
#: what a file says of itself, whatever it extends
_OWN = ("schema", "name", "title", "version")


def target_names() -> tuple[str, ...]:
    """Names of the targets that come with `qat`, sorted."""
    return tuple(
        sorted(
            entry.name.removesuffix(".yaml").replace("_", "-")
            for entry in resources.files("qat.targets").iterdir()
            if entry.name.endswith(".yaml")
        )
    )


def load_target(*names: str) -> Target:
    """Load a target by name or file path; the intersection where several are given.

    Raises:
        TargetError: No such target, a malformed file, or targets that contradict each other.
    """
    if not names:
        raise TargetError("no target was named", f"choose from {', '.join(target_names())}")
    return reduce(lambda a, b: a.intersect(b), (_load_one(name) for name in dict.fromkeys(names)))


def _load_one(name: str) -> Target:
    text, source, folder = _read(name, Path())
    return parse_target(text, source, folder)


def _read(name: str, folder: Path) -> tuple[str, str, Path]:
    """Return the text of a target, the name of its file for messages, and the folder that paths in it start from."""
    if name.endswith((".yaml", ".yml")):
        path = folder / name
        try:
            return path.read_text(encoding="utf-8"), str(path), path.parent
        except OSError as error:
            raise TargetError(f"cannot read target file {path} ({error.strerror})", "give an existing file") from None
        except UnicodeDecodeError:
            raise TargetError(f"{path} is not text in UTF-8", "give a target file") from None
    _require(name, f"unknown target {name!r}")
    entry = resources.files("qat.targets").joinpath(name.replace("-", "_") + ".yaml")
    return entry.read_text(encoding="utf-8"), entry.name, folder


def _require(name: str, cause: str) -> None:
    names = target_names()
    if name not in names:
        near = difflib.get_close_matches(name, names, n=1)
        raise TargetError(cause, f"did you mean {near[0]}?" if near else f"choose from {', '.join(names)}")


def parse_target(text: str, source: str, folder: Path | None = None) -> Target:
    """Read the text of a target file.

    Args:
        text: The YAML.
        source: Name of the file, for messages.
        folder: Where paths in `extends` start from; None for the working folder.

    Raises:
        TargetError: It is not YAML, has unknown or missing keys, or a value that is not legal; `source` is named.
    """
    return make_target(_merged(text, source, folder or Path(), ()), source)


def _merged(text: str, source: str, folder: Path, above: tuple[str, ...]) -> dict[str, Any]:
    """The data of a file, on that of the files it extends."""
    data = _document(text, source)
    base = data.pop("extends", None)
    if base is None:
        return data
    if not isinstance(base, str):
        raise TargetError(f"{source}: extends is {base!r}", "write the name of one target")
    if not base.endswith((".yaml", ".yml")):
        _require(base, f"{source} extends the unknown target {base!r}")
    for key in _OWN:
        if key not in data:
            raise TargetError(f"{source} lacks the key {key!r}", "add it: a target does not take it from another")
    text, below, folder = _read(base, folder)
    if below in (*above, source):
        raise TargetError(f"{source} extends {base}, which extends it in turn", "break the circle")
    return _over(_merged(text, below, folder, (*above, source)), data)


def _document(text: str, source: str) -> dict[str, Any]:
    try:
        data = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise TargetError(f"{source} is not YAML ({' '.join(str(error).split())})", "correct it") from None
    if not isinstance(data, dict) or "schema" not in data:
        raise TargetError(f"{source} is not a target file", SEE)
    if data["schema"] != SCHEMA_VERSION or isinstance(data["schema"], bool):
        raise TargetError(f"{source} has schema {data['schema']!r}", f"this qat reads schema {SCHEMA_VERSION}")
    return data


def _over(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in changes.items():
        if value is None:
            merged.pop(key, None)
        elif isinstance(value, dict) and isinstance(merged.get(key), dict):
            merged[key] = _over(merged[key], value)
        else:
            merged[key] = value
    return merged
