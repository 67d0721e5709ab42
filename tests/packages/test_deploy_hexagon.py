"""The deploy script for Hexagon: SoC, model, process domain, libraries, and runs of a qnn-net-run that is played."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from deploy_cases import ARM, GOLDEN, HEXAGON, X86, Phones, elf, expected, make

from qat.packages.deploy.socs import read_socs, soc_table

ROOT = Path(__file__).resolve().parents[2]
FIRST, SECOND = "sys/devices/soc0/soc_id", "sys/devices/system/soc/soc0/id"
ONNX = ("model.onnx", "onnx", ())
CONTEXTS = [(f"contexts/v{v}/model_ctx.onnx", "qnn-context", (("htp_arch", f"{v}"),)) for v in (73, 75)]


@pytest.fixture
def phones(tmp_path: Path) -> Phones:
    return Phones(tmp_path / "drawer")


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An ONNX model, and contexts for V73 and V75."""
    return make(tmp_path_factory.mktemp("hexagon"), "hexagon", [ONNX, *CONTEXTS])


def sdk_of(folder: Path, *, net_run: str | None = None) -> Path:
    """Something laid out like Qualcomm's SDK."""
    arm = folder / "lib/aarch64-android"
    arm.mkdir(parents=True)
    for name in ("Htp", "HtpPrepare", "System", "Dsp"):
        (arm / f"libQnn{name}.so").write_bytes(elf(ARM))
    for backend, version in (("Dsp", 65), ("Dsp", 66), *(("Htp", v) for v in (68, 69, 73, 75, 79, 81))):
        (arm / f"libQnn{backend}V{version}Stub.so").write_bytes(elf(ARM))
        skels = folder / f"lib/hexagon-v{version}/unsigned"
        skels.mkdir(parents=True)
        (skels / f"libQnn{backend}V{version}Skel.so").write_bytes(elf(HEXAGON))
    if net_run is not None:
        (folder / "bin/aarch64-android").mkdir(parents=True)
        (folder / "bin/aarch64-android/qnn-net-run").write_text(net_run)
    return folder


@pytest.fixture(scope="module")
def sdk(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(sdk_of(tmp_path_factory.mktemp("sdk")))


# the SoC --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", [FIRST, SECOND])
def test_both_places_of_the_soc_id(place: str, phones: Phones, package: Path, sdk: str) -> None:
    phones.add(files={place: "519\n"})
    done = phones.deploy(package, QNN_SDK_ROOT=sdk)
    assert (done.returncode, done.stderr) == (0, ""), done.stdout
    assert f"soc: SM8550 (soc_id 519 in /{place})" in done.stdout
    assert "dsp: HTP V73 (CDSP, litert)" in done.stdout
    assert "model: contexts/v73/model_ctx.onnx (compiled for V73)" in done.stdout
    assert "process domain: unsigned (SM8550 takes libraries that are not signed" in done.stdout
    pushed = phones.pushed()
    assert {"libQnnHtp.so", "libQnnHtpV73Stub.so", "libQnnHtpV73Skel.so", "libQnnSystem.so"} <= set(pushed)
    assert "libQnnHtpPrepare.so" not in pushed
    assert pushed["contexts/v73/model_ctx.onnx"] == b"model contexts/v73/model_ctx.onnx"
    assert pushed["contexts/v73/model_ctx.bin"] == b"blob"
    assert "model.onnx" not in pushed
    assert b"ADSP_LIBRARY_PATH=" in pushed["run.sh"]
    assert b"LD_LIBRARY_PATH=" in pushed["run.sh"]


@pytest.mark.parametrize(
    ("soc_id", "said"),
    [
        ("457", "dsp: HTP V69"),
        ("660", "dsp: HTP V81"),
        ("356", "dsp: DSP V66 (CDSP, mace; it has no HTP)"),
        ("415", "dsp: HTP V68 (CDSP, mace)"),
    ],
)
def test_generations(soc_id: str, said: str, phones: Phones, package: Path, sdk: str) -> None:
    phones.add(files={FIRST: soc_id})
    done = phones.deploy(package, "--dry-run", QNN_SDK_ROOT=sdk)
    assert done.returncode == 0
    assert said in done.stdout


def test_a_soc_that_is_not_in_the_table(phones: Phones, package: Path, sdk: str) -> None:
    phones.add("A1", files={FIRST: "9999"}, properties={"ro.board.platform": "new"})
    done = phones.deploy(package, "-s", "A1", QNN_SDK_ROOT=sdk)
    assert done.returncode == 2
    assert (
        "soc_id 9999 (ro.soc.model empty, ro.board.platform new) is not in deploy/soc.tsv; set QAT_DSP" in done.stderr
    )
    assert phones.left("A1") == []
    phones.add("B2", files={FIRST: "9999"}, properties={"ro.soc.model": "SM8650-AC"})
    done = phones.deploy(package, "-s", "B2", "--dry-run", QNN_SDK_ROOT=sdk)
    assert "soc: SM8650 (soc_id 9999 is not in deploy/soc.tsv, but ro.soc.model is SM8650-AC)" in done.stdout
    done = phones.deploy(package, "-s", "A1", "--dry-run", QNN_SDK_ROOT=sdk, QAT_DSP="V75")
    assert "dsp: HTP V75" in done.stdout
    assert "(QAT_DSP says so)" in done.stdout
    done = phones.deploy(package, "-s", "A1", QNN_SDK_ROOT=sdk, QAT_DSP="V74")
    assert "QAT_DSP is V74, which deploy/soc.tsv does not know" in done.stderr


def test_a_phone_that_is_none_of_qualcomms(phones: Phones, package: Path, sdk: str) -> None:
    phones.add(properties={"ro.board.platform": "mt6983"})
    done = phones.deploy(package, QNN_SDK_ROOT=sdk)
    assert (done.returncode, phones.left()) == (2, [])
    assert "shows no soc_id of Qualcomm's (ro.board.platform is mt6983)" in done.stderr


# the model ------------------------------------------------------------------------------------------------------------


def test_without_a_context_the_phone_compiles(phones: Phones, package: Path, sdk: str) -> None:
    phones.add(files={FIRST: "618"})
    done = phones.deploy(package, QNN_SDK_ROOT=sdk)
    assert "model: model.onnx (the package has no context binary for V79: the phone compiles it" in done.stdout
    assert {"libQnnHtpPrepare.so", "model.onnx", "golden/model.onnx/000/input_0.npy"} <= set(phones.pushed())
    assert "to run it: ONNX Runtime with the QNN execution provider, backend_path libQnnHtp.so" in done.stdout


def test_without_any_model_for_the_dsp(phones: Phones, tmp_path: Path, sdk: str) -> None:
    phones.add(files={FIRST: "618"})
    done = phones.deploy(make(tmp_path / "package", "hexagon", CONTEXTS[:1]), QNN_SDK_ROOT=sdk)
    assert (done.returncode, phones.left()) == (2, [])
    assert "the package has no model for V79; make it for the target hexagon-v79" in done.stderr


def test_weights_beside_the_model_go_along(phones: Phones, tmp_path: Path, sdk: str) -> None:
    folder = tmp_path / "package"
    folder.mkdir()
    (folder / "model.onnx.data").write_bytes(b"weights")
    phones.add(files={FIRST: "618"})
    assert phones.deploy(make(folder, "hexagon", [ONNX]), QNN_SDK_ROOT=sdk).returncode == 0
    assert phones.pushed()["model.onnx.data"] == b"weights"


# the process domain ---------------------------------------------------------------------------------------------------


def test_sm8150_tries_without_signature(phones: Phones, package: Path, sdk: str, tmp_path: Path) -> None:
    phones.add("A1", files={FIRST: "339"}, properties={"ro.boot.secureboot": "1"})
    done = phones.deploy(package, "-s", "A1", QNN_SDK_ROOT=sdk)
    assert done.returncode == 0
    assert "process domain: unsigned (new firmware of SM8150" in done.stdout
    assert "note: if loading the skel fails, the firmware is an old one: that needs ro.boot.secureboot 0" in done.stdout
    testsig = tmp_path / "testsig-0x1.so"
    testsig.write_bytes(b"signature")
    phones.add("B2", files={FIRST: "339"}, properties={"ro.boot.secureboot": "0"})
    done = phones.deploy(package, "-s", "B2", QNN_SDK_ROOT=sdk, TESTSIG=str(testsig))
    assert "process domain: unsigned, else signed (some firmware of SM8150 refuses" in done.stdout
    assert phones.pushed("B2")["testsig-0x1.so"] == b"signature"
    assert {"libQnnDsp.so", "libQnnDspV66Stub.so", "libQnnDspV66Skel.so"} <= set(phones.pushed("B2"))


@pytest.mark.parametrize("secure", ["1", ""])
def test_older_dsps_need_secureboot_off(secure: str, phones: Phones, package: Path, sdk: str) -> None:
    phones.add(files={FIRST: "321"}, properties={"ro.boot.secureboot": secure})
    done = phones.deploy(package, QNN_SDK_ROOT=sdk)
    assert (done.returncode, phones.left()) == (2, [])
    assert f"takes no test signature (ro.boot.secureboot is {secure or 'empty'}, not 0)" in done.stderr


def test_older_dsps_need_a_test_signature(phones: Phones, package: Path, sdk: str, tmp_path: Path) -> None:
    phones.add(files={FIRST: "321"}, properties={"ro.boot.secureboot": "0"})
    done = phones.deploy(package, QNN_SDK_ROOT=sdk)
    assert "SDM845 loads signed libraries only, and TESTSIG names no test signature; make one with" in done.stderr
    done = phones.deploy(package, QNN_SDK_ROOT=sdk, TESTSIG="/no/testsig.so")
    assert "there is no test signature /no/testsig.so" in done.stderr
    assert phones.left() == []
    testsig = tmp_path / "testsig.so"
    testsig.write_bytes(b"signature")
    done = phones.deploy(package, QNN_SDK_ROOT=sdk, TESTSIG=str(testsig))
    assert "process domain: signed (ro.boot.secureboot is 0" in done.stdout
    assert {"testsig.so", "libQnnDspV65Skel.so"} <= set(phones.pushed())


@pytest.mark.parametrize("soc_id", ["292", "246", "317"])
def test_dsps_that_are_no_longer_served(soc_id: str, phones: Phones, package: Path, sdk: str) -> None:
    phones.add(files={FIRST: soc_id}, properties={"ro.boot.secureboot": "0"})
    done = phones.deploy(package, QNN_SDK_ROOT=sdk)
    assert (done.returncode, phones.left()) == (2, [])
    assert "that Qualcomm's libraries no longer serve" in done.stderr


# the libraries --------------------------------------------------------------------------------------------------------


def test_libraries_that_are_missing(phones: Phones, package: Path, tmp_path: Path) -> None:
    phones.add(files={FIRST: "519"})
    done = phones.deploy(package)
    assert "neither QNN_SDK_ROOT nor QNN_LIB_DIR is set; set QNN_SDK_ROOT to Qualcomm's AI Runtime SDK" in done.stderr
    sdk = sdk_of(tmp_path / "sdk")
    (sdk / "lib/hexagon-v73/unsigned/libQnnHtpV73Skel.so").unlink()
    done = phones.deploy(package, QNN_SDK_ROOT=str(sdk))
    assert f"libQnnHtpV73Skel.so is neither below QNN_SDK_ROOT ({sdk}) nor in QNN_LIB_DIR (unset)" in done.stderr
    assert (done.returncode, phones.left()) == (2, [])


@pytest.mark.parametrize("below", ["", "jni/arm64-v8a"])
def test_one_folder_of_libraries(below: str, phones: Phones, package: Path, tmp_path: Path, sdk: str) -> None:
    phones.add(files={FIRST: "519"})
    (tmp_path / "flat" / below).mkdir(parents=True)
    for library in Path(sdk).rglob("*.so"):
        (tmp_path / "flat" / below / library.name).write_bytes(library.read_bytes())
    assert phones.deploy(package, QNN_LIB_DIR=str(tmp_path / "flat")).returncode == 0
    assert "libQnnHtpV73Skel.so" in phones.pushed()


def test_libraries_of_this_computer_are_refused(phones: Phones, package: Path, tmp_path: Path) -> None:
    phones.add(files={FIRST: "519"})
    (tmp_path / "libQnnHtp.so").write_bytes(elf(X86))
    done = phones.deploy(package, QNN_LIB_DIR=str(tmp_path))
    assert (done.returncode, phones.left()) == (2, [])
    assert "libQnnHtp.so is not for this phone (its ELF machine is 62, not 183)" in done.stderr


def test_a_dsp_library_that_is_not_seen_is_a_note(phones: Phones, package: Path, sdk: str) -> None:
    phones.add("A1", files={FIRST: "519"})
    assert "note: libcdsprpc.so is not seen" in phones.deploy(package, "--dry-run", QNN_SDK_ROOT=sdk).stdout
    (phones.folder / "phones/A1/root/vendor/lib64").mkdir(parents=True)
    (phones.folder / "phones/A1/root/vendor/lib64/libcdsprpc.so").touch()
    assert "libcdsprpc" not in phones.deploy(package, "--dry-run", QNN_SDK_ROOT=sdk).stdout


# running --------------------------------------------------------------------------------------------------------------

NET_RUN = """#!/bin/sh
# plays qnn-net-run: says its command line, reads its list of inputs, gives the answers that lie in {answers}
printf '%s ' "$@"
[ "$LD_LIBRARY_PATH" = "$PWD:/vendor/lib64" ] || exit 9
case $ADSP_LIBRARY_PATH in "$PWD;"*) ;; *) exit 9 ;; esac
index=0
while read -r row; do
    [ -f "$row" ] || exit 8
    mkdir -p "answers/Result_$index"
    cp {answers}/$index.raw "answers/Result_$index/{name}.raw"
    index=$((index + 1))
done <inputs.txt
exit {status}
"""


def ready(
    tmp_path: Path, phones: Phones, apart: float, *, dtype: str = "int8", name: str = "y 'z", status: int = 0
) -> tuple[Path, str]:
    """A package, a phone with V73, and an SDK whose qnn-net-run answers this far from what is expected."""
    answers = tmp_path / "answers"
    answers.mkdir()
    for sample in range(GOLDEN):
        found: Any = expected(sample, dtype) + np.asarray([[0, 0, 0, 0, 0, apart]], dtype)
        (answers / f"{sample}.raw").write_bytes(found.tobytes())
    text = NET_RUN.format(answers=answers, name=name, status=status)
    phones.add(files={FIRST: "519"})
    package = make(tmp_path / "package", "hexagon", CONTEXTS, dtype=dtype)
    return package, str(sdk_of(tmp_path / "sdk", net_run=text))


@pytest.mark.parametrize(("apart", "dtype", "status"), [(1, "int8", 0), (-300, "int16", 1), (0.5, "float32", 0)])
def test_the_golden_inputs_are_run(apart: float, dtype: str, status: int, phones: Phones, tmp_path: Path) -> None:
    package, sdk = ready(tmp_path, phones, apart, dtype=dtype)
    done = phones.deploy(package, "--run", QNN_SDK_ROOT=sdk)
    assert (done.returncode, done.stderr) == (status, "")
    assert "output y 'z of sample 000: " in done.stdout
    assert "output y 'z of sample 001: " in done.stdout
    assert ("WRONG" in done.stdout) == (status == 1)
    assert ("--use_native_input_files --use_native_output_files" in done.stdout) == (dtype != "float32")


@pytest.mark.parametrize("name", ["y 'z_native", "renamed_by_the_compiler"])
def test_answers_under_other_names(name: str, phones: Phones, tmp_path: Path) -> None:
    package, sdk = ready(tmp_path, phones, 0, name=name)
    assert phones.deploy(package, "--run", QNN_SDK_ROOT=sdk).returncode == 0


def test_a_run_that_fails(phones: Phones, tmp_path: Path) -> None:
    package, sdk = ready(tmp_path, phones, 0, status=15)
    done = phones.deploy(package, "--run", QNN_SDK_ROOT=sdk)
    assert done.returncode == 1
    assert "qnn-net-run ended with status 15: --backend libQnnHtp.so --retrieve_context contexts/v73/" in done.stdout


def test_answers_of_another_size(phones: Phones, tmp_path: Path) -> None:
    package, sdk = ready(tmp_path, phones, 0)
    (tmp_path / "answers/0.raw").write_bytes(b"12345")
    done = phones.deploy(package, "--run", QNN_SDK_ROOT=sdk)
    assert done.returncode == 1
    assert "sample 000: WRONG: 5 bytes in place of 6" in done.stdout


def test_running_needs_a_context_and_a_program(phones: Phones, package: Path, sdk: str) -> None:
    phones.add(files={FIRST: "519"})
    done = phones.deploy(package, "--run", QNN_SDK_ROOT=sdk)
    assert (done.returncode, phones.left()) == (2, [])
    assert "--run needs a context binary for V73 in the package, and qnn-net-run of QNN_SDK_ROOT" in done.stderr


# the table ------------------------------------------------------------------------------------------------------------


def test_the_table_of_socs() -> None:
    socs = read_socs()
    assert len({soc.soc_id for soc in socs}) == len(socs)
    for soc in socs:
        assert soc.backend in ("htp", "dsp", "none")
        assert soc.signing in ("unsigned", "try", "signed", "-")
        assert soc.source in ("mace", "litert", "rwkv", "vendor")
        assert (soc.backend == "htp") == (soc.dsp in ("V68", "V69", "V73", "V75", "V79", "V81"))
        assert soc.backend != "htp" or soc.signing == "unsigned"


def test_the_documented_table_is_up_to_date() -> None:
    assert soc_table() in (ROOT / "docs/deploy.md").read_text(encoding="utf-8")
