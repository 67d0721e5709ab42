"""Deploy scripts against phones that are played: what each finds, decides, says, pushes and leaves."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
from deploy_cases import ARM, ARM64, BASE, CPU, PLAN, SHELLS, Phones, elf, make

from qat.errors import ExportError
from qat.packages.artifact import Artifact
from qat.packages.deploy.write import write_deploy

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
