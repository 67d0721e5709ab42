"""Deploy scripts against phones that are played: what each finds, decides, says, pushes and leaves."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from deploy_cases import ARM, ARM64, BASE, CPU, X86, Phones, elf, in_script, make
from torch import nn

import qat
from qat.errors import ExportError
from qat.packages.artifact import Artifact
from qat.packages.deploy.write import write_deploy
from qat.packages.golden import golden_samples, write_golden

SHELLS = [name for name in ("dash", "bash") if shutil.which(name)]
PLAN = [("model.qatplan", "plan", ())]
RUN = f"{BASE}/qat-net"


@pytest.fixture
def phones(tmp_path: Path) -> Phones:
    return Phones(tmp_path / "drawer")


@pytest.fixture(scope="module")
def arm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A package for ARM CPUs, with something that looks like a runner."""
    return make(tmp_path_factory.mktemp("arm"), "arm-cpu", PLAN, runner=elf(ARM))


def files_of(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="needs shellcheck")
@pytest.mark.parametrize("family", ["arm-cpu", "hexagon", "apu"])
def test_shellcheck_finds_nothing(family: str, tmp_path: Path) -> None:
    script = make(tmp_path, family, []) / "deploy.sh"
    done = subprocess.run(["shellcheck", "-s", "sh", str(script)], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "")


def test_what_cannot_be_written_is_named(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"model.qatplan is missing; write the artifacts and golden samples before"):
        write_deploy(tmp_path, "arm-cpu", "net", [Artifact("model.qatplan", "plan", "onnx", (), ())], 0)
    (tmp_path / "a\tb").touch()
    with pytest.raises(ExportError, match=r"has a tab or a line break in a name; rename"):
        write_deploy(tmp_path, "arm-cpu", "net", [Artifact("a\tb", "plan", "onnx", (), ())], 0)
    assert not (tmp_path / "deploy.sh").exists()
    write_deploy(tmp_path, "arm-cpu", "my net/2", [], 0)
    assert (tmp_path / "deploy/contents.tsv").read_text() == "package\tmy_net_2\nfamily\tarm-cpu\n"


# reaching the phone ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("state", "cause", "mend"),
    [
        ("unauthorized", "the phone A1 is locked for this computer", "allow USB debugging"),
        ("offline", "the phone A1 is offline", "connect it again"),
        ("no permissions (missing udev rules?); see [http://x]", "may not use the phone A1 (no perm", "udev rules"),
        ("recovery", "the phone A1 is in the state recovery", "boot it into Android"),
    ],
)
def test_a_phone_that_cannot_be_used(state: str, cause: str, mend: str, phones: Phones, arm: Path) -> None:
    phones.add(state=state)
    done = phones.deploy(arm)
    assert done.returncode == 2
    assert cause in done.stderr
    assert mend in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert phones.calls() == ["|devices|"]


def test_no_phone_or_several(phones: Phones, arm: Path) -> None:
    assert "no phone is connected; connect one by USB" in phones.deploy(arm).stderr
    phones.add("A1")
    phones.add("B2", state="unauthorized")
    done = phones.deploy(arm)
    assert (done.returncode, "several phones are connected: A1, B2; choose one with -s" in done.stderr) == (2, True)
    done = phones.deploy(arm, "-s", "C3")
    assert "no phone with the serial C3 is connected; choose one of these with -s: A1, B2" in done.stderr
    assert phones.deploy(arm, "-s", "A1", "--dry-run").returncode == 0
    assert "phone B2 is locked" in phones.deploy(arm, ANDROID_SERIAL="B2").stderr
    assert all(line.startswith(("|devices|", "|-s|A1|")) for line in phones.calls() if line.startswith("|"))


def test_adb_that_is_missing_or_broken(phones: Phones, arm: Path, tmp_path: Path) -> None:
    assert "there is no adb (/no/adb); install Android's platform-tools" in phones.deploy(arm, ADB="/no/adb").stderr
    broken = tmp_path / "adb"
    broken.write_text("#!/bin/sh\necho 'cannot bind listener' >&2\nexit 1\n")
    broken.chmod(0o755)
    assert "adb does not work (cannot bind listener)" in phones.deploy(arm, ADB=str(broken)).stderr


@pytest.mark.parametrize(
    ("properties", "said"),
    [
        ({"ro.product.cpu.abilist": "armeabi-v7a,armeabi"}, "runs no arm64-v8a programs (it has armeabi-v7a,armeabi)"),
        ({"ro.product.cpu.abilist": "", "ro.product.cpu.abi": "x86_64"}, "runs no arm64-v8a programs (it has x86_64)"),
        ({"ro.product.cpu.abilist": ""}, "it has no ABI"),
        ({"ro.build.version.release": ""}, "Android version of the phone A1 is not known (none, API none)"),
        ({"ro.build.version.release": "W", "ro.build.version.sdk": "later"}, "is not known (W, API later)"),
    ],
)
def test_phones_that_do_not_do(properties: dict[str, str], said: str, phones: Phones, arm: Path) -> None:
    phones.add(properties=properties)
    done = phones.deploy(arm)
    assert (done.returncode, phones.left()) == (2, [])
    assert said in done.stderr


@pytest.mark.parametrize(
    ("release", "sdk", "android"),
    [
        ("8.1.0", "27", 8),
        ("10", "29", 10),
        ("R", "30", 11),
        ("S_V2", "32", 12),
        ("Tiramisu", "33", 13),
        ("X", "36", 16),
    ],
)
def test_the_android_version(release: str, sdk: str, android: int, phones: Phones, arm: Path) -> None:
    phones.add(properties={"ro.build.version.release": release, "ro.build.version.sdk": sdk})
    done = phones.deploy(arm, "--dry-run")
    assert f"android: {android} (ro.build.version.release is {release}, API level {sdk})" in done.stdout


def test_the_command_line(phones: Phones, arm: Path) -> None:
    phones.add()
    assert "--no is no option; see ./deploy.sh --help" in phones.deploy(arm, "--no").stderr
    assert "-s has no value" in phones.deploy(arm, "-s").stderr
    assert "--dir tmp is no absolute path" in phones.deploy(arm, "--dir", "tmp").stderr
    done = phones.deploy(arm, "--help")
    assert done.returncode == 0
    assert "--dry-run" in done.stdout
    assert "QAT_RUN" in done.stdout
    assert phones.calls() == []


# pushing --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shell", SHELLS)
@pytest.mark.parametrize("old", [False, True])
def test_a_package_is_installed_whole(shell: str, old: bool, phones: Phones, arm: Path) -> None:
    before = files_of(arm)
    phones.add(files={"proc/cpuinfo": CPU.format("asimddp")}, **({"old": ""} if old else {}))
    done = phones.deploy(arm, shell=shell)
    assert (done.returncode, done.stderr) == (0, ""), done.stdout
    pushed = phones.pushed()
    for name in ("model.qatplan", "golden/model.qatplan/000/input_0.npy", "golden/model.qatplan/001/input_0.npy"):
        assert pushed[name] == before[name]
    assert ".qat-package" in pushed
    assert not any("output" in name for name in pushed)
    assert phones.left() == ["qat-net"]
    assert "installed: /data/local/tmp/qat-net" in done.stdout
    assert files_of(arm) == before
    assert [p.name for p in phones.folder.iterdir() if p.name.startswith("qat-deploy")] == []


def test_a_dry_run_changes_nothing(phones: Phones, arm: Path) -> None:
    root = phones.add(files={"proc/cpuinfo": CPU.format("")})
    done = phones.deploy(arm, "--dry-run")
    assert done.returncode == 0
    assert f"would push: {arm}/model.qatplan -> /data/local/tmp/qat-net/model.qatplan" in done.stdout
    assert "to run it: adb -s A1 shell" in done.stdout
    assert "dry run: the phone was not changed" in done.stdout
    assert not any("|push|" in call for call in phones.calls())
    assert list((root / BASE).iterdir()) == []


def test_an_earlier_installation_is_replaced(phones: Phones, arm: Path) -> None:
    root = phones.add(files={f"{RUN}/.qat-package": "", f"{RUN}/old": "old", f"{BASE}/other": "mine"})
    assert phones.deploy(arm).returncode == 0
    assert "old" not in phones.pushed()
    assert phones.left() == ["other", "qat-net"]
    assert (root / BASE / "other").read_text() == "mine"


def test_a_directory_that_is_not_ours_is_not_touched(phones: Phones, arm: Path) -> None:
    phones.add(files={f"{RUN}/mine": "mine"})
    done = phones.deploy(arm)
    assert done.returncode == 2
    assert "/data/local/tmp/qat-net on the phone is no package of qat" in done.stderr
    assert phones.pushed() == {"mine": b"mine"}
    assert phones.left() == ["qat-net"]


def test_another_place(phones: Phones, arm: Path) -> None:
    root = phones.add(files={"data/local/tmp/mine/x": ""})
    assert "is no directory of the phone that adb may write" in phones.deploy(arm, "--dir", "/data/nowhere").stderr
    assert phones.deploy(arm, "--dir", "/data/local/tmp/mine/").returncode == 0
    assert (root / "data/local/tmp/mine/qat-net/model.qatplan").is_file()


@pytest.mark.parametrize(
    ("trouble", "cause"),
    [
        ({"fail_push": "model.qatplan"}, "pushing model.qatplan failed (adb: error: failed to copy"),
        ({"cut_push": "model.qatplan"}, "model.qatplan arrived with 9 of 19 bytes"),
    ],
)
def test_a_push_that_fails_leaves_the_phone_as_it_was(
    trouble: dict[str, str], cause: str, phones: Phones, arm: Path
) -> None:
    phones.add(files={f"{RUN}/.qat-package": "", f"{RUN}/old": "old"}, **trouble)
    done = phones.deploy(arm)
    assert done.returncode == 2
    assert cause in done.stderr
    assert phones.pushed() == {".qat-package": b"", "old": b"old"}
    assert phones.left() == ["qat-net"]


@pytest.mark.parametrize("shell", SHELLS)
def test_an_interrupted_push_leaves_the_phone_as_it_was(shell: str, phones: Phones, arm: Path) -> None:
    phones.add(files={f"{RUN}/.qat-package": "", f"{RUN}/old": "old"}, hang_push="model.qatplan")
    running = subprocess.Popen(
        [shell, str(arm / "deploy.sh")],
        env=phones.environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    hangs = phones.folder / "phones/A1/hangs"
    while not hangs.exists() and running.poll() is None:
        time.sleep(0.02)
    os.killpg(running.pid, signal.SIGTERM)
    assert running.wait(timeout=60) == 130
    assert phones.left() == ["qat-net"]
    assert phones.pushed() == {".qat-package": b"", "old": b"old"}
    assert [p.name for p in phones.folder.iterdir() if p.name.startswith("qat-deploy")] == []


def test_a_phone_that_goes_away_is_said_and_what_it_keeps(phones: Phones, arm: Path) -> None:
    phones.add(lose_after=8)
    done = phones.deploy(arm)
    assert done.returncode == 2
    assert "(adb: device 'A1' not found)" in done.stderr
    assert (
        "may have been left on the phone; remove it with adb shell rm -rf /data/local/tmp/qat-net.part-" in done.stdout
    )
    gone = Phones(phones.folder / "other")
    gone.add(lose_after=0)
    assert "does not answer any more" in gone.deploy(arm).stderr


def test_low_storage(phones: Phones, arm: Path) -> None:
    phones.add(free=100)
    done = phones.deploy(arm)
    assert done.returncode == 2
    assert "the phone has 100 KiB left below /data/local/tmp and the package needs 4; free some space" in done.stderr
    assert phones.left() == []


def test_storage_of_an_old_df_is_not_known(phones: Phones, arm: Path) -> None:
    phones.add(free=None)
    done = phones.deploy(arm)
    assert done.returncode == 0
    assert "note: free space below /data/local/tmp is not known" in done.stdout


def test_a_package_that_is_not_whole(phones: Phones, tmp_path: Path) -> None:
    phones.add()
    package = make(tmp_path / "package", "arm-cpu", PLAN, runner=elf(ARM))
    (package / "model.qatplan").unlink()
    done = phones.deploy(package)
    assert "model.qatplan is missing; the package is not whole" in done.stderr
    assert phones.left() == []
    shutil.rmtree(package / "deploy")
    assert "contents.tsv is missing or damaged" in phones.deploy(package).stderr


def test_json(phones: Phones, arm: Path) -> None:
    phones.add(properties={"ro.product.model": 'a "b" \\c'})
    done = phones.deploy(arm, "--json")
    told = json.loads(done.stdout)
    assert (told["status"], told["package"], told["phone"], told["error"]) == (0, "net", "A1", [])
    assert {"what": "abi", "value": "arm64-v8a", "why": f"of {ARM64['ro.product.cpu.abilist']}"} in told["decisions"]
    assert told["decisions"][0]["why"] == 'maker unknown, a "b" \\c'
    assert told["push"][0]["as"] == "qat_run"
    assert "installed:" in done.stderr
    (phones.folder / "phones" / "A1" / "state").write_text("offline")
    told = json.loads(phones.deploy(arm, "--json").stdout)
    assert told["status"] == 2
    assert told["error"][0].startswith("the phone A1 is offline; ")


# comparing ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shell", SHELLS)
@pytest.mark.parametrize(
    ("dtype", "expected", "found", "bound", "said"),
    [
        ("int8", [1, -128, 127], [1, -128, 127], 0, "equal, 3 bytes"),
        ("int8", [1, -128, 127], [1, -127, 127], 0, "WRONG: 1 of 3 differ, by up to 1 codes"),
        ("int8", [1, -128, 127], [1, -128, 126], 1, "1 of 3 differ, by up to 1 codes (allowed: 1)"),
        ("int8", [1, -128, 127], [127, 127, 127], 1, "WRONG: 2 of 3 differ, by up to 255 codes"),
        ("int8", [1, 2, 3], [1, 2], 9, "WRONG: 2 bytes in place of 3"),
        ("int8", [1, 2, 3], [1, 2, 9], "-", "1 of 3 differ, by up to 6 codes (recorded; no bound is known)"),
        ("uint8", [0, 128, 255], [0, 127, 254], 1, "2 of 3 differ, by up to 1 codes (allowed: 1)"),
        ("uint16", [0, 40000, 65535], [0, 40200, 65535], 1, "1 of 3 differ, by up to 200 codes (allowed: 256)"),
        ("int16", [0, -20000, 9], [300, -20000, 9], 1, "WRONG: 1 of 3 differ, by up to 300 codes"),
        ("int32", [0, -(1 << 31), 9], [0, -(1 << 31), 8], 1, "1 of 3 differ, by up to 1 codes (allowed: 1)"),
        ("float32", [1e-3, -2.5, 3], [1e-3, -2.0, 3], 1, "1 of 3 differ, by up to 1 codes (allowed: 1)"),
        ("float32", [1e-3, -2.5, 3], [1e-3, -1.5, 3], 1, "WRONG: 1 of 3 differ, by up to 2 codes"),
        ("float32", [1, 2, 3], [1, 2, float("nan")], 1, "WRONG: 1 of 3 differ, by up to 1e+30 codes"),
        ("float32", [1, 2, 3], [1, 2, float("inf")], 1, "WRONG: 1 of 3 differ, by up to "),
        ("float32", [1, float("nan"), 3], [1, 2, 3], 1, "WRONG: 1 of 3 differ, by up to 1e+30 codes"),
        ("complex64", [1, 2, 3], [1, 2, 4], 1, None),
    ],
)
def test_answers_are_compared_in_codes(
    shell: str,
    dtype: str,
    expected: list[float],
    found: list[float],
    bound: int | str,
    said: str | None,
    arm: Path,
    tmp_path: Path,
) -> None:
    np.save(tmp_path / "expected.npy", np.asarray(expected, dtype))
    np.asarray(found, dtype).tofile(tmp_path / "found")
    commands = f'cd {tmp_path}; compare y expected.npy found {dtype} 0.5 {bound}; echo "verdict $VERDICT"'
    if said is None:
        with pytest.raises(AssertionError, match="y is of type complex64, which cannot be compared"):
            in_script(arm, tmp_path, commands, shell)
        return
    told = in_script(arm, tmp_path, commands, shell).splitlines()
    assert told[0].startswith(f"output y: {said}")
    assert told[1] == ("verdict failed" if said.startswith("WRONG") else "verdict ")


def test_a_long_header_of_an_array_is_skipped(arm: Path, tmp_path: Path) -> None:
    array = np.zeros(2, [("a" * 70000, "i1")])
    with (tmp_path / "long.npy").open("wb") as file:
        np.lib.format.write_array(file, array, version=(2, 0))
    (tmp_path / "found").write_bytes(bytes(2))
    assert "equal, 2 bytes" in in_script(arm, tmp_path, f"cd {tmp_path}; compare y long.npy found int8 1 0")


# ARM CPU --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("features", "said"),
    [
        ("asimddp i8mm", "kernels: i8mm (i8mm is among"),
        ("asimddp", "kernels: dot product (asimddp is among"),
        ("", "kernels: plain NEON (neither"),
        (None, "note: /proc/cpuinfo lists no features"),
    ],
)
def test_kernels_are_reported(features: str | None, said: str, phones: Phones, arm: Path) -> None:
    phones.add(files={} if features is None else {"proc/cpuinfo": CPU.format(features)})
    assert said in phones.deploy(arm, "--dry-run").stdout


def test_runners(phones: Phones, arm: Path, tmp_path: Path) -> None:
    phones.add()
    package = make(tmp_path / "package", "arm-cpu", PLAN)
    assert "has no built runner; build it as README.md says, and set QAT_RUN" in phones.deploy(package).stderr
    assert "there is no runner /no/runner" in phones.deploy(package, QAT_RUN="/no/runner").stderr
    foreign = tmp_path / "qat_run"
    foreign.write_bytes(elf(X86))
    assert f"the runner {foreign} is no program for arm64" in phones.deploy(arm, QAT_RUN=str(foreign)).stderr
    foreign.write_text("#!/bin/sh\n")
    assert "is no program for arm64" in phones.deploy(arm, QAT_RUN=str(foreign)).stderr
    foreign.write_bytes(elf(ARM, "mine"))
    done = phones.deploy(package, QAT_RUN=str(foreign))
    assert f"runner: {foreign} (QAT_RUN names it)" in done.stdout
    assert phones.pushed()["qat_run.arm64"].endswith(b"mine")


def test_a_package_without_plan(phones: Phones, tmp_path: Path) -> None:
    phones.add()
    package = make(tmp_path / "package", "arm-cpu", [("model.onnx", "onnx", ())])
    assert "has no plan for the native runner; use model.onnx or model.tflite" in phones.deploy(package).stderr


# what runs under qemu -------------------------------------------------------------------------------------------------

RUNNER = r"""
#include <stdio.h>
#include <string.h>
/* answers x + STEP for int8 arrays, as qat_run's command line has it */
int main(int count, char** words) {
    const char *in = NULL, *out = NULL;
    for (int i = 2; i + 1 < count; ++i) {
        if (!strcmp(words[i], "--input")) in = words[++i];
        else if (!strcmp(words[i], "--output")) out = words[++i];
        else if (!strcmp(words[i], "--repeat")) printf("median 1.0 ms of %s\n", words[++i]);
    }
#ifdef ILLEGAL
    __asm__ volatile(".inst 0x00000000");
#endif
    FILE *from = fopen(in, "rb"), *to = fopen(out, "wb");
    if (!from || !to) return 2;
    for (int c, n = 0; (c = getc(from)) != EOF; ++n) putc(n < 128 ? c : c + STEP, to);
    return fclose(to) ? 1 : 0;
}
"""
_TOOLS = ("aarch64-linux-gnu-gcc", "qemu-aarch64-static")
needs_arm = pytest.mark.skipif(
    not all(map(shutil.which, _TOOLS)), reason=f"needs {' and '.join(_TOOLS)}: scripts/setup --system"
)


@pytest.fixture(scope="module")
def runner(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., bytes]:
    folder = tmp_path_factory.mktemp("runner")

    def build(*options: str) -> bytes:
        (folder / "run.c").write_text(RUNNER)
        words = ["aarch64-linux-gnu-gcc", "-static", "-O1", *options, "run.c", "-o", "run"]
        subprocess.run(words, cwd=folder, check=True)
        return (folder / "run").read_bytes()

    return build


@needs_arm
@pytest.mark.parametrize("shell", SHELLS)
def test_answers_that_are_expected(shell: str, runner: Callable[..., bytes], phones: Phones, tmp_path: Path) -> None:
    phones.add()
    package = make(tmp_path / "package", "arm-cpu", PLAN, runner=runner("-DSTEP=1"))
    done = phones.deploy(package, "--run", shell=shell)
    assert (done.returncode, done.stderr) == (0, ""), done.stdout
    assert "output y 'z of sample 000: equal, 6 bytes" in done.stdout
    assert "output y 'z of sample 001: equal, 6 bytes" in done.stdout
    assert "  median 1.0 ms of 20" in done.stdout


@needs_arm
@pytest.mark.heavy
def test_the_native_runner_on_three_processors(phones: Phones, tmp_path: Path) -> None:
    runners = pytest.importorskip("qat.packages.runner", reason="needs the native runner")
    torch.manual_seed(0)
    model, x = (
        nn.Sequential(nn.Conv2d(3, 8, 3, 2), nn.ReLU(), nn.Flatten(), nn.Linear(392, 10)),
        torch.randn(50, 3, 16, 16),
    )
    qmodel = qat.prepare(model.eval(), (x[:1],), target=qat.load_target("arm-cpu"))
    qat.calibrate(qmodel, [x])
    imodel = qat.convert(qmodel)
    artifact = runners.write_plan(imodel, tmp_path, qat.IoMode("codes", "codes"))
    batches = [(x[:1],), (x[1:2],)]
    write_golden(tmp_path, artifact, *golden_samples(imodel, artifact, batches))
    shutil.copyfile(runners.build_runner(), tmp_path / "qat_run")
    write_deploy(tmp_path, "arm-cpu", "net", [artifact], len(batches))
    phones.add()
    for processor, chosen in (("cortex-a53", "neon"), ("neoverse-n1", "neondot"), ("max", "i8mm")):
        done = phones.deploy(tmp_path, "--run", FAKE_CPU=processor)
        assert (done.returncode, done.stderr) == (0, ""), done.stdout
        assert f"instruction set: {chosen}\n" in done.stdout
        assert done.stdout.count(": equal, 10 bytes") == 2


@needs_arm
def test_answers_that_are_not_expected(runner: Callable[..., bytes], phones: Phones, tmp_path: Path) -> None:
    phones.add()
    package = make(tmp_path / "package", "arm-cpu", PLAN, runner=runner("-DSTEP=4"))
    done = phones.deploy(package, "--run", "--json")
    assert done.returncode == 1
    assert "output y 'z of sample 000: WRONG: 6 of 6 differ, by up to 3 codes" in done.stderr
    told = json.loads(done.stdout)
    assert told["status"] == 1
    assert [o["output"] for o in told["outputs"]] == ["y 'z of sample 000", "y 'z of sample 001"]


@needs_arm
def test_an_illegal_instruction_is_told_from_other_ends(
    runner: Callable[..., bytes], phones: Phones, tmp_path: Path
) -> None:
    phones.add()
    package = make(tmp_path / "package", "arm-cpu", PLAN, runner=runner("-DSTEP=1", "-DILLEGAL"))
    done = phones.deploy(package, "--run")
    assert done.returncode == 1
    assert "the runner ended with status 132 (illegal instruction: kernels were chosen that this" in done.stdout
