"""AIMET's files of encodings: what is written, and what is read back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import qat
from qat.cli import main
from qat.encoding import Encoding
from qat.encodings import Encodings
from qat.errors import EncodingError
from qat.interop.aimet import VERSIONS, aimet_document, read_aimet, read_aimet_document, write_aimet
from qat.scheme import Granularity, int_type


def encoding(dtype: str, scale: tuple[float, ...], zero: tuple[int, ...], symmetric: bool, axis: int = 0) -> Encoding:
    kind = int_type(dtype)
    granularity = Granularity() if len(scale) == 1 else Granularity("per_channel", axis)
    return Encoding(dtype, scale, zero, kind.qmin, kind.qmax, symmetric=symmetric, granularity=granularity)


TABLE = Encodings({
    "x": encoding("uint8", (0.5,), (127,), False),
    "w": encoding("int8", (0.25, 0.125), (0, 0), True),
    "b": encoding("int32", (0.125, 0.0625), (0, 0), True),
    "h": encoding("uint16", (0.5,), (3,), False),
    "n": encoding("int8", (0.5,), (-3,), False),
})  # fmt: skip
PARAMETERS = {"w", "b"}


def test_version_0() -> None:
    found = aimet_document(TABLE, parameters=PARAMETERS, version="0.6.1")
    assert set(found) == {"version", "producer", "activation_encodings", "param_encodings", "quantizer_args"}
    assert found["activation_encodings"]["x"] == [
        {
            "bitwidth": 8,
            "dtype": "int",
            "is_symmetric": "False",
            "min": -63.5,
            "max": 64.0,
            "offset": -127,
            "scale": 0.5,
        }
    ]
    # a signed zero point is one of the unsigned grid
    assert found["activation_encodings"]["n"][0]["offset"] == -125
    first, second = found["param_encodings"]["w"]
    assert (first["offset"], first["min"], first["max"], first["is_symmetric"]) == (-128, -32.0, 31.75, "True")
    assert second["scale"] == 0.125
    assert "b" not in found["param_encodings"]
    assert found["quantizer_args"]["activation_bitwidth"] == 16
    assert found["quantizer_args"]["per_channel_quantization"] is True


def test_version_1() -> None:
    found = aimet_document(TABLE, parameters=PARAMETERS, version="1.0.0", biases=True)
    by_name = {e["name"]: e for key in ("activation_encodings", "param_encodings") for e in found[key]}
    assert by_name["x"] == {
        "name": "x", "enc_type": "PER_TENSOR", "dtype": "INT", "bw": 8, "is_sym": False,
        "scale": [0.5], "offset": [-127],
    }  # fmt: skip
    assert by_name["w"]["enc_type"] == "PER_CHANNEL"
    assert by_name["w"]["offset"] == [-128, -128]
    assert (by_name["b"]["bw"], by_name["b"]["offset"]) == (32, [-(1 << 31)] * 2)
    assert [e["name"] for e in found["param_encodings"]] == ["w", "b"]


def test_version_2() -> None:
    found = aimet_document(TABLE, parameters=PARAMETERS, version="2.0.0", biases=True)
    by_name = {e["name"]: e for e in found["encodings"]}
    assert by_name["x"] == {"name": "x", "output_dtype": "uint8", "y_scale": 0.5, "y_zero_point": 127}
    # ONNX's own sign; zeros are left out
    assert by_name["n"]["y_zero_point"] == -3
    assert by_name["w"] == {"name": "w", "output_dtype": "int8", "y_scale": [0.25, 0.125], "axis": 0}
    assert by_name["b"]["output_dtype"] == "int32"


@st.composite
def tables(draw: st.DrawFn) -> Encodings:
    found = {}
    for name in draw(st.lists(st.text(min_size=1, max_size=8), unique=True, min_size=1, max_size=4)):
        symmetric = draw(st.booleans())
        dtype = draw(st.sampled_from(("int4", "int8", "int16") if symmetric else ("uint4", "uint8", "uint16")))
        kind, channels = int_type(dtype), draw(st.integers(1, 3))
        scale = draw(st.lists(st.floats(2.0**-20, 10.0, width=32), min_size=channels, max_size=channels))
        zeros = [0 if symmetric else draw(st.integers(kind.qmin, kind.qmax)) for _ in scale]
        found[name] = encoding(dtype, tuple(scale), tuple(zeros), symmetric)
    return Encodings(found)


@given(table=tables(), version=st.sampled_from(VERSIONS))
def test_what_is_written_is_read(table: Encodings, version: Any) -> None:
    parameters = {name for name, e in table.items() if not e.per_tensor}
    data = json.loads(json.dumps(aimet_document(table, parameters=parameters, version=version)))
    found = read_aimet_document(data, "file")
    assert found.keys() == table.keys()
    for name, e in table.items():
        assert found[name].same_grid(e)
        assert found[name].symmetric == e.symmetric
        assert found[name].provenance == "imported"


@pytest.mark.parametrize("version", VERSIONS)
def test_biases_and_axes_come_back(version: Any, tmp_path: Path) -> None:
    table = Encodings({**TABLE, "t": encoding("int8", (0.5, 0.25), (0, 0), True, axis=1)})
    write_aimet(table, tmp_path / "e.encodings", parameters={*PARAMETERS, "t"}, version=version, biases=True)
    found = read_aimet(tmp_path / "e.encodings", axes={"t": 1})
    assert found["t"].same_grid(table["t"])
    assert found["b"].same_grid(table["b"])
    # the same grid, though before 2.0.0 not the sign
    n = found["n"]
    assert n.zero_point[0] - n.qmin == 125


# -- what is refused

ENTRY_1 = {
    "name": "x",
    "enc_type": "PER_TENSOR",
    "dtype": "INT",
    "bw": 8,
    "is_sym": False,
    "scale": [0.5],
    "offset": [0],
}
ENTRY_2 = {"name": "x", "output_dtype": "uint8", "y_scale": 0.5, "y_zero_point": 3}
ENTRY_0 = {"bitwidth": 8, "dtype": "int", "is_symmetric": "False", "min": 0, "max": 1, "offset": 0, "scale": 0.5}


def one(**changes: Any) -> dict[str, Any]:
    entry = {k: v for k, v in {**ENTRY_1, **changes}.items() if v is not ...}
    return {"version": "1.0.0", "activation_encodings": [entry], "param_encodings": []}


def two(**changes: Any) -> dict[str, Any]:
    return {"version": "2.0.0", "encodings": [{k: v for k, v in {**ENTRY_2, **changes}.items() if v is not ...}]}


def zero(*entries: Any) -> dict[str, Any]:
    return {"version": "0.6.1", "activation_encodings": {"x": list(entries)}, "param_encodings": {}}


@pytest.mark.parametrize(("data", "message"), [
    ([], "file is no file of AIMET encodings: it has no 'version'"),
    ({"version": "3"}, "file has version '3'; read are 0.6.1, 1.0.0, 2.0.0"),
    ({"version": "1.0.0"}, "file: the file: the key 'activation_encodings' is missing"),
    ({"version": "0.6.1", "activation_encodings": []}, "'activation_encodings' is .* and no object"),
    ({"version": "2.0.0", "encodings": [1]}, r"encodings\[0\]: it is no object"),
    (one(name=...), r"activation_encodings\[0\]: the key 'name' is missing"),
    (one(bw="8"), "'x': 'bw' is '8' and no whole number"),
    (one(bw=7), "'x': 7 bits are not read"),
    (one(is_sym="True"), "'x': 'is_sym' is 'True' and no true or false"),
    (one(enc_type="LPBQ"), "'x': 'enc_type' is 'LPBQ' and no one of PER_TENSOR, PER_CHANNEL"),
    (one(dtype="FLOAT"), "'x': 'dtype' is 'FLOAT' and no 'INT'"),
    (one(scale=[0.0]), "'x': 'scale' is .* and no list of positive numbers"),
    (one(scale=0.5), "'x': 'scale' is 0.5 and no list of positive numbers"),
    (one(offset=[0.5]), "'x': 'offset' is .* and no list of whole numbers"),
    (one(offset=[1]), "'x': the zero point -1 is outside the integer range"),
    (one(offset=[0, 0]), "'x': 1 scales and 2 zero points"),
    (one(is_sym=True), "'x': a symmetric int8 encoding has a zero point other than 0"),
    (two(y_scale=...), "'x': the key 'y_scale' is missing"),
    (two(y_scale=-1), "'x': 'y_scale' is -1"),
    (two(output_dtype="float16"), "'x': 'output_dtype' is 'float16'"),
    (two(block_size=16), "'x': 'block_size': a scale for each group is not read"),
    (two(y_zero_point="0"), "'x': 'y_zero_point' is '0'"),
    (two(axis="0"), "'x': 'axis' is '0'"),
    (zero(), "'x': it is no list of objects, one a channel"),
    (zero({**ENTRY_0, "scale": None}), "'x': 'scale' is None"),
    (zero(ENTRY_0, {**ENTRY_0, "bitwidth": 4}), "'x': its channels differ in 'bitwidth'"),
    (zero({**ENTRY_0, "dtype": "float"}), "'x': 'dtype' is 'float'"),
    ({**two(), "encodings": [ENTRY_2, ENTRY_2]}, "file: 'x' occurs twice"),
])  # fmt: skip
def test_a_malformed_file_is_named(data: Any, message: str) -> None:
    with pytest.raises(EncodingError, match=message):
        read_aimet_document(data, "file")


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(EncodingError, match=r"cannot read .*none"):
        read_aimet(tmp_path / "none")
    (tmp_path / "half").write_text('{"version": "1.0')
    with pytest.raises(EncodingError, match="half is not JSON"):
        read_aimet(tmp_path / "half")


def test_what_cannot_be_written(tmp_path: Path) -> None:
    grouped = Encoding(
        "int8", (1.0, 1.0), (0, 0), -128, 127, symmetric=True, granularity=Granularity("per_group", 1, 2)
    )
    with pytest.raises(EncodingError, match="'g' has a scale for each group"):
        write_aimet(Encodings({"g": grouped}), tmp_path / "e", parameters={"g"})
    with pytest.raises(EncodingError, match=r"no format '3' of encodings; choose 0.6.1"):
        aimet_document(TABLE, parameters=(), version="3")  # type: ignore[arg-type]
    assert not (tmp_path / "e").exists()


# -- the command line


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import torch
    from torch import nn

    folder = tmp_path_factory.mktemp("aimet")
    model, x = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Flatten(), nn.Linear(16, 2)), torch.randn(4, 3, 2, 2)
    qmodel = qat.prepare(model.eval(), x, target=qat.load_target("hexagon-v73"))
    with pytest.warns(UserWarning, match="calibrated on"):
        qat.calibrate(qmodel, [x], progress=False)
    qat.export_onnx(qmodel, folder / "model.onnx", verify=False)
    qmodel.encodings().save(folder / "encodings.json")
    return folder


@pytest.mark.parametrize("version", VERSIONS)
def test_convert(exported: Path, version: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, out, back = exported / "encodings.json", tmp_path / "e.encodings", tmp_path / "back.json"
    model = ["--model", str(exported / "model.onnx")]
    assert main(["encodings", "convert", str(source), str(out), "--to", "aimet", "--version", version, *model]) == 0
    assert "tensors are in" in capsys.readouterr().out
    assert main(["encodings", "convert", str(out), str(back), "--to", "qat"]) == 0
    table, found = Encodings.load(source), Encodings.load(back)
    assert {"input", "1", "3", "0.weight", "3.weight"} <= found.keys()
    # the result of a reshape has its input's
    assert "2" not in found
    assert all(found[name].same_grid(table[name]) for name in found)
    parameters = json.loads(out.read_text()).get("param_encodings")
    names = [p if isinstance(p, str) else p["name"] for p in parameters or ()]
    assert version == "2.0.0" or names == ["0.weight", "3.weight"]


@pytest.mark.parametrize(("arguments", "message"), [
    (["--to", "aimet"], "name the ONNX file by --model"),
    (["--to", "aimet", "--model", "none.onnx"], "cannot read the ONNX model none.onnx"),
    (["--to", "qat"], "has no 'version'"),
    (["--to", "mnn"], "mnn"),
])  # fmt: skip
def test_convert_refuses(
    exported: Path, arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = exported / "encodings.json"
    if arguments == ["--to", "qat"]:
        source = tmp_path / "no.json"
        source.write_text("{}")
    assert main(["encodings", "convert", str(source), str(tmp_path / "out"), *arguments]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_convert_wants_the_model_of_the_table(
    exported: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    TABLE.save(tmp_path / "other.json")
    model = str(exported / "model.onnx")
    arguments = ["encodings", "convert", str(tmp_path / "other.json"), str(tmp_path / "out"), "--to", "aimet"]
    assert main([*arguments, "--model", model]) == 2
    assert "give the model that the table was made for" in capsys.readouterr().err
