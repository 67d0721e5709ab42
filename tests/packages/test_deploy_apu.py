"""The deploy script for MediaTek's APU: library sets, the phone's adapter, the model, and runs that are recorded."""

from __future__ import annotations

from pathlib import Path

import pytest
from deploy_cases import Phones, expected, in_script, make

MODEL = ("model.tflite", "tflite", (("device", "mediatek-apu"),))
COMPILED = ("compiled/mt6983/model.tflite", "neuron", (("soc_model", "mt6983"),))
USDK, MGVI, OLD = "libneuronusdk_adapter.mtk.so", "libneuron_adapter_mgvi.so", "libneuron_adapter.so"


@pytest.fixture
def phones(tmp_path: Path) -> Phones:
    return Phones(tmp_path / "drawer")


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("apu"), "apu", [MODEL, COMPILED])


def mediatek(soc: str, release: str) -> dict[str, str]:
    return {"ro.board.platform": soc, "ro.build.version.release": release}


@pytest.mark.parametrize(
    ("soc", "release", "wanted"),
    [
        ("mt6771", "8.1.0", "v1"),
        ("mt6785", "10", "v1"),
        ("mt6853", "10", "v2"),
        ("mt6885", "9", "v2"),
        ("mt6785", "11", "v3"),
        ("mt6873", "11", "v3"),
        ("mt6893", "11", "v4"),
        ("mt6877", "11", "v4"),
        ("mt6877", "12", "v4"),
        ("mt6785", "13", "v4"),
        ("mt6983", "14", "v4"),
    ],
)
def test_library_sets(soc: str, release: str, wanted: str, package: Path, tmp_path: Path) -> None:
    android = release.partition(".")[0]
    said = in_script(package, tmp_path, f"ANDROID={android} SOC={soc}; choose_set")
    assert said == f"library set: {wanted} (Android {android} on {soc})\n"


def test_versions_with_dots_choose_a_set(phones: Phones, package: Path) -> None:
    phones.add(properties=mediatek("MT6771", "8.1.0"))
    done = phones.deploy(package, "--dry-run", APU_LIBRARY_ROOT="none")
    assert "library set: v1 (Android 8 on mt6771)" in done.stdout


@pytest.mark.parametrize(
    ("there", "chosen"),
    [
        ((f"system/lib64/{OLD}", f"vendor/lib64/{MGVI}"), f"/vendor/lib64/{MGVI}"),
        ((f"vendor/lib64/{OLD}", f"system_ext/lib64/{USDK}"), f"/system_ext/lib64/{USDK}"),
        ((f"vendor/lib64/mt6983/{OLD}",), f"/vendor/lib64/mt6983/{OLD}"),
    ],
)
def test_the_phones_adapter(there: tuple[str, ...], chosen: str, phones: Phones, package: Path) -> None:
    phones.add(files=dict.fromkeys(there, ""), properties=mediatek("mt6983", "13"))
    done = phones.deploy(package)
    assert (done.returncode, done.stderr) == (0, ""), done.stdout
    assert f"adapter: {chosen} (the first of the three names that the phone has" in done.stdout
    assert not any(name.endswith(".so") for name in phones.pushed())


def test_a_phone_without_adapter(phones: Phones, package: Path) -> None:
    phones.add(properties=mediatek("mt6983", "13"))
    done = phones.deploy(package)
    assert (done.returncode, phones.left()) == (2, [])
    assert f"the phone has none of MediaTek's adapters ({USDK}, {MGVI}, {OLD})" in done.stderr


def test_other_phones(phones: Phones, package: Path) -> None:
    phones.add("A1", properties={"ro.board.platform": "kalama"})
    done = phones.deploy(package, "-s", "A1")
    assert (done.returncode, phones.left("A1")) == (2, [])
    assert "has no MediaTek SoC (ro.board.platform is kalama, ro.soc.model is empty)" in done.stderr
    phones.add("B2", files={f"vendor/lib64/{OLD}": ""}, properties={"ro.soc.model": "MT6983Z/CZA"})
    done = phones.deploy(package, "-s", "B2")
    assert "soc: mt6983 (ro.board.platform is empty, ro.soc.model is MT6983Z/CZA)" in done.stdout


def test_the_model(phones: Phones, package: Path) -> None:
    phones.add("A1", files={f"vendor/lib64/{OLD}": ""}, properties=mediatek("mt6983", "14"))
    done = phones.deploy(package, "-s", "A1")
    assert "model: compiled/mt6983/model.tflite (compiled for mt6983)" in done.stdout
    assert "compiled/mt6983/model.tflite" in phones.pushed("A1")
    phones.add("B2", files={f"vendor/lib64/{OLD}": ""}, properties=mediatek("mt6989", "14"))
    done = phones.deploy(package, "-s", "B2")
    assert "model: model.tflite (the phone compiles it itself)" in done.stdout
    assert phones.pushed("B2")["model.tflite"] == b"model model.tflite"


def test_a_package_without_a_model_for_the_phone(phones: Phones, tmp_path: Path) -> None:
    phones.add(files={f"vendor/lib64/{OLD}": ""}, properties=mediatek("mt6989", "14"))
    done = phones.deploy(make(tmp_path / "package", "apu", [COMPILED]))
    assert "the package has no .tflite for mt6989; make it for the target apu" in done.stderr


# libraries that the phone lacks ---------------------------------------------------------------------------------------


@pytest.fixture
def mace(tmp_path: Path) -> Path:
    """Something laid out like third_party/apu of a MACE checkout."""
    folder = tmp_path / "apu"
    names = [
        *("android_Q/mt67xx/libapu-frontend.so", "android_Q/mt67xx/mt6785/libapu-platform.so"),
        *("android_Q/mt68xx/libapu-frontend.so", "android_Q/mt68xx/mt6885/libapu-platform.so"),
        *("android_Q/mt68xx/mt6853/libapu-platform.so", "android_Q/mt68xx/mt6853/libapu-frontend.so"),
        *(f"android_R/libapu-apuware{name}.so" for name in ("apusys.mtk", "utils.mtk", "xrp.mtk", "apusys.mtk")),
        *("android_R/libapu-apuwareapusys.mtk.so", "android_R/libapu-frontend.so", "android_R/libapu-platform.so"),
    ]
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)
    return folder


@pytest.mark.parametrize(
    ("soc", "release", "libraries"),
    [
        ("mt6785", "10", {"libapu-frontend.so": "android_Q/mt67xx/libapu-frontend.so"}),
        ("mt6885", "10", {"libapu-platform.so": "android_Q/mt68xx/mt6885/libapu-platform.so"}),
        ("mt6853", "10", {"libapu-frontend.so": "android_Q/mt68xx/mt6853/libapu-frontend.so"}),
        ("mt6873", "11", {"libapu-apuwareapusys.mtk.so": "android_R/libapu-apuwareapusys.mtk.so"}),
        ("mt6785", "11", {"libapu-apuwarexrp.mtk.so": "android_R/libapu-apuwarexrp.mtk.so"}),
    ],
)
def test_libraries_of_older_phones(
    soc: str, release: str, libraries: dict[str, str], phones: Phones, package: Path, mace: Path
) -> None:
    phones.add(properties=mediatek(soc, release))
    done = phones.deploy(package, APU_LIBRARY_ROOT=str(mace))
    assert (done.returncode, done.stderr) == (0, ""), done.stdout
    pushed = phones.pushed()
    assert {name: pushed[name].decode() for name in libraries} == libraries
    count = sum(name.endswith(".so") for name in pushed)
    assert count == (2 if release == "10" else 4 if soc == "mt6785" else 5)
    assert "/vendor/lib64 is not touched" in done.stdout


def test_libraries_that_are_missing(phones: Phones, package: Path, mace: Path) -> None:
    phones.add("A1", properties=mediatek("mt6785", "10"))
    done = phones.deploy(package, "-s", "A1")
    assert "library set v1 is no part of this phone, and APU_LIBRARY_ROOT names no folder with it" in done.stderr
    (mace / "android_Q/mt67xx/libapu-frontend.so").unlink()
    assert "has no libapu-frontend.so" in phones.deploy(package, "-s", "A1", APU_LIBRARY_ROOT=str(mace)).stderr
    phones.add("B2", properties=mediatek("mt6833", "10"))
    assert (
        "has no libapu-platform.so for mt6833" in phones.deploy(package, "-s", "B2", APU_LIBRARY_ROOT=str(mace)).stderr
    )
    (mace / "android_R/libapu-platform.so").unlink()
    phones.add("C3", properties=mediatek("mt6873", "11"))
    assert "has no libapu-platform.so" in phones.deploy(package, "-s", "C3", APU_LIBRARY_ROOT=str(mace)).stderr
    assert [phones.left(serial) for serial in ("A1", "B2", "C3")] == [[], [], []]
    done = phones.deploy(package, "-s", "A1", APU_LIBRARY_ROOT="none")
    assert "libraries: none (APU_LIBRARY_ROOT is none" in done.stdout
    assert "model.tflite" in phones.pushed("A1")


@pytest.mark.parametrize("device", ["/dev/vpu", "/dev/apusys"])
def test_a_device_that_the_shell_may_not_open(device: str, phones: Phones, package: Path) -> None:
    files = {f"vendor/lib64/{OLD}": "", "dev/vpu": "", "dev/apusys": ""}
    phones.add(files=files, properties=mediatek("mt6983", "13"), closed=device)
    done = phones.deploy(package, "--dry-run")
    assert done.stdout.count("adb's shell may not open") == 1
    assert f"note: adb's shell may not open {device}" in done.stdout


# running --------------------------------------------------------------------------------------------------------------

BENCHMARK = """#!/bin/sh
# plays benchmark_model: answers one more than the input, plus {step}
for word in "$@"; do
    case $word in
    --input_layer_value_files=x:*) input=${{word#*x:}} ;;
    --output_filepath=*) output=${{word#*=}} ;;
    --input_layer_shape=*) [ "${{word#*=}}" = 1,6 ] || exit 7 ;;
    esac
done
[ "$(wc -c <"$input")" -eq 6 ] || exit 8
tr '\\000-\\076' '\\00{step}-\\076' <"$input" >"$output"
echo "Inference timings in us: Init: 1, First inference: 2"
exit {status}
"""


def test_running_is_recorded(phones: Phones, package: Path, tmp_path: Path) -> None:
    phones.add(files={f"vendor/lib64/{OLD}": ""}, properties=mediatek("mt6989", "13"))
    done = phones.deploy(package, "--run")
    assert "--run needs BENCHMARK_MODEL: this package has no program that runs a .tflite" in done.stderr
    assert (done.returncode, phones.left()) == (2, [])
    tool = tmp_path / "benchmark_model"
    assert expected(0).tolist() == [[1, 2, 3, 4, 5, 6]]
    for step, said in (("1", "equal, 6 bytes"), ("2", "6 of 6 differ, by up to 1 codes (recorded; no bound is known)")):
        tool.write_text(BENCHMARK.format(step=step, status=0))
        done = phones.deploy(package, "--run", BENCHMARK_MODEL=str(tool))
        assert (done.returncode, done.stderr) == (0, ""), done.stdout
        assert f"output y 'z of sample 000: {said}" in done.stdout
        assert "  Inference timings in us" in done.stdout
        assert "--use_nnapi=true" in done.stdout
    tool.write_text(BENCHMARK.format(step="1", status=3))
    done = phones.deploy(package, "--run", BENCHMARK_MODEL=str(tool), BENCHMARK_ARGS="--use_gpu=false")
    assert done.returncode == 1
    assert "sample 000: benchmark_model ended with status 3: " in done.stdout
    assert "--use_gpu=false" in done.stdout
