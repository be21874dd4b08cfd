"""What is packaged comes back as the same bundle, or not at all."""

from __future__ import annotations

import ast
import hashlib
import io
import json
import shutil
import subprocess
import sys
import tarfile
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest
from builds import Run, Sample
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from signatures import COUNTER, Pair, resign, sha256, tree

from glmexport.bundle.bundle import Bundle
from glmexport.bundle.manifest import read_manifest
from glmexport.foundation.errors import (
    EXIT_INPUT,
    EXIT_UNVERIFIED,
    BundleError,
    InputError,
    MachineError,
    UnverifiedError,
)
from glmexport.foundation.progress import Silent
from glmexport.release import unpacker, verifier
from glmexport.release.kit import write_kit
from glmexport.release.layout import FILE_PATH, read_layout, unpack_layout, write_layout
from glmexport.release.verification import verify


def nothing(_: Path) -> None:
    """No check."""


@pytest.fixture
def layout(signed: Path, tmp_path: Path) -> Path:
    """An image layout of the signed bundle."""
    write_layout(Bundle.open(signed), tmp_path / "layout", Silent())
    return tmp_path / "layout"


def test_a_layout_is_what_registries_carry(layout: Path, signed: Path) -> None:
    assert json.loads((layout / "oci-layout").read_bytes()) == {"imageLayoutVersion": "1.0.0"}
    digest, content, image = read_layout(layout)
    assert digest == f"sha256:{hashlib.sha256(content).hexdigest()}"
    table = json.loads(content)
    assert table["artifactType"] == "application/vnd.cncf.model.manifest.v1+json"
    assert {layer.name: layer.hex for layer in image.layers} == tree(signed)
    kinds = {layer.name: layer.mediaType.split(".model.")[1] for layer in image.layers}
    assert kinds["model.onnx"] == kinds["weights/block_000.data"] == "weight.v1.raw"
    assert kinds["tokenizer.json"] == kinds["bundle.json"] == "weight.config.v1.raw"
    assert kinds["report.html"] == kinds["attestations/provenance.json"] == "doc.v1.raw"
    assert kinds["verify.py"] == "code.v1.raw"
    config = json.loads((layout / "blobs" / "sha256" / image.config.hex).read_bytes())
    assert config["modelfs"]["diffIds"] == [layer.digest for layer in image.layers]
    assert config["config"]["format"] == "onnx" and config["descriptor"]["version"] == read_manifest(signed).digest()
    for path in (layout / "blobs" / "sha256").iterdir():
        assert path.name == sha256(path)


def test_the_same_bundle_gives_the_same_bytes(layout: Path, signed: Path, tmp_path: Path) -> None:
    write_layout(Bundle.open(signed), tmp_path / "again", Silent())
    assert tree(tmp_path / "again") == tree(layout)
    for name in ("kit", "kit again"):
        write_kit(Bundle.open(signed), tmp_path / name, Silent(), 1 << 16)
    assert tree(tmp_path / "kit") == tree(tmp_path / "kit again")


def test_a_layout_comes_back(layout: Path, signed: Path, tmp_path: Path, keys: Pair) -> None:
    unpack_layout(layout, tmp_path / "back", lambda bundle: verify(bundle, keys.public), Silent())
    assert tree(tmp_path / "back") == tree(signed)
    with pytest.raises(InputError, match="exists"):
        unpack_layout(layout, tmp_path / "back", nothing, Silent())
    with pytest.raises(InputError, match="exists"):
        write_layout(Bundle.open(signed), layout, Silent())


def test_what_is_not_signed_or_changed_is_not_packaged(release: Path, sample: Sample, tmp_path: Path) -> None:
    for write in (write_layout, write_kit):
        with pytest.raises(BundleError, match="not signed"):
            write(Bundle.open(sample.bundle), tmp_path / "out", Silent())
    path = release / "weights" / "block_001.data"
    path.write_bytes(bytes(reversed(path.read_bytes())))
    for write in (write_layout, write_kit):
        with pytest.raises(UnverifiedError, match=r"block_001\.data"):
            write(Bundle.open(release), tmp_path / "out", Silent())
    (release / "extra").write_bytes(b"")
    with pytest.raises(UnverifiedError, match="extra"):
        write_layout(Bundle.open(release), tmp_path / "out", Silent())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["release"]


def test_a_damaged_blob_is_named(layout: Path, tmp_path: Path) -> None:
    _, _, image = read_layout(layout)
    for layer in image.layers:
        blob = layout / "blobs" / "sha256" / layer.hex
        content = blob.read_bytes()
        for damaged in (content[:-1] + bytes([content[-1] ^ 1]), content[:-1], None):
            blob.unlink()
            if damaged is not None:
                blob.write_bytes(damaged)
            with pytest.raises(UnverifiedError, match=layer.name):
                unpack_layout(layout, tmp_path / "back", nothing, Silent())
            blob.write_bytes(content)
    blob.rename(tmp_path / "elsewhere")
    blob.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UnverifiedError, match=layer.name):
        unpack_layout(layout, tmp_path / "back", nothing, Silent())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["elsewhere", "layout"]


def rename_layers(layout: Path, names: list[str]) -> None:
    """Other names for the first layers; every digest is right again."""
    _, content, _ = read_layout(layout)
    table = json.loads(content)
    for layer, name in zip(table["layers"], names, strict=False):
        layer["annotations"][FILE_PATH] = name
    write_manifest(layout, json.dumps(table).encode())


def write_manifest(layout: Path, content: bytes) -> None:
    """Another manifest, which the index names."""
    digest = hashlib.sha256(content).hexdigest()
    (layout / "blobs" / "sha256" / digest).write_bytes(content)
    index = json.loads((layout / "index.json").read_bytes())
    index["manifests"][0] |= {"digest": f"sha256:{digest}", "size": len(content)}
    (layout / "index.json").write_text(json.dumps(index))


@pytest.mark.parametrize("tag", ["", "-x", ".x", "a b", "a\nb", "a/b", "a:b", "x" * 129, "ü", "\x1b[2J"])
def test_a_tag_is_one(tag: str, signed: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no tag"):
        write_layout(Bundle.open(signed), tmp_path / "layout", Silent(), tag)
    assert not list(tmp_path.iterdir())


def test_names_in_a_layout_are_lines(signed: Path, tmp_path: Path) -> None:
    """Whatever the manifest calls its source."""
    manifest = read_manifest(signed)
    source = manifest.source.model_copy(update={"name": "a\x1b[2J\nb\u2028c"})
    strange = manifest.model_copy(update={"source": source})
    write_layout(Bundle(signed, strange), tmp_path / "layout", Silent())
    _, content, image = read_layout(tmp_path / "layout")
    config = json.loads((tmp_path / "layout" / "blobs" / "sha256" / image.config.hex).read_bytes())
    titles = [json.loads(content)["annotations"]["org.opencontainers.image.title"], config["descriptor"]["name"]]
    assert titles == ["a [2J b c"] * 2 and config["descriptor"]["title"].isprintable()


@pytest.mark.parametrize(
    "names",
    [
        ["../x"],
        ["/x"],
        ["a/../../x"],
        ["x\x00"],
        [""],
        ["x", "x"],
        ["x", "X"],
        ["x", "x/y"],
        ["\u00e9", "e\u0301"],
        ["C:x"],
    ],
    ids=ascii,
)
def test_hostile_names_in_a_layout_are_refused(names: list[str], layout: Path, tmp_path: Path) -> None:
    before = set(tmp_path.parent.iterdir())
    rename_layers(layout, names)
    with pytest.raises(UnverifiedError, match="names"):
        unpack_layout(layout, tmp_path / "back", nothing, Silent())
    assert set(tmp_path.parent.iterdir()) == before and not (tmp_path / "back").exists()


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60, deadline=None)
@given(st.recursive(st.none() | st.integers() | st.text(max_size=8), lambda inner: st.lists(inner) | st.dictionaries(
    st.sampled_from(["schemaVersion", "manifests", "digest", "size", "mediaType", "layers"]), inner), max_leaves=8,
))  # fmt: skip
def test_an_index_of_anything_is_refused(layout: Path, content: object) -> None:
    (layout / "index.json").write_text(json.dumps(content))
    with pytest.raises((InputError, UnverifiedError)):
        read_layout(layout)


@pytest.fixture
def kit(signed: Path, tmp_path: Path) -> Path:
    """A kit of the signed bundle in small volumes."""
    volumes = write_kit(Bundle.open(signed), tmp_path / "kit", Silent(), 1 << 16)
    assert len(volumes) > 4
    return tmp_path / "kit"


def unpack(kit: Path, output: Path, *given: str | Path) -> subprocess.CompletedProcess[str]:
    """The script of a kit, without the packages of this environment."""
    command = [sys.executable, "-I", "-S", str(kit / "unpack.py"), "-o", str(output), *map(str, given)]
    return subprocess.run(command, check=False, capture_output=True, text=True, timeout=60, cwd=output.parent)


def test_a_kit_comes_back_with_python_alone(kit: Path, signed: Path, tmp_path: Path, keys: Pair) -> None:
    done = unpack(kit, tmp_path / "back", "--key", keys.public, "--newer-than", str(COUNTER - 1), "--json")
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout)["digest"] == read_manifest(signed).digest()
    assert tree(tmp_path / "back") == tree(signed)
    assert all((path.stat().st_size <= 1 << 16) for path in kit.glob("bundle.tar.*"))
    subprocess.run(["sha256sum", "-c", "SHA256SUMS"], check=True, cwd=kit, capture_output=True)
    again = unpack(kit, tmp_path / "back", "--key", keys.public)
    assert again.returncode == EXIT_INPUT and "exists" in again.stderr
    older = unpack(kit, tmp_path / "older", "--key", keys.public, "--newer-than", str(COUNTER))
    assert older.returncode == EXIT_UNVERIFIED and "counter" in older.stderr
    assert unpack(kit, tmp_path / "x").returncode == EXIT_INPUT
    assert sorted(path.name for path in tmp_path.iterdir()) == ["back", "kit"]


def flipped(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def test_a_damaged_volume_is_named(kit: Path, tmp_path: Path, keys: Pair) -> None:
    for change in (flipped, Path.unlink, lambda path: path.write_bytes(b"")):
        for path in sorted(kit.glob("bundle.tar.*"))[1:3]:
            content = path.read_bytes()
            change(path)
            done = unpack(kit, tmp_path / "back", "--key", keys.public)
            assert done.returncode == EXIT_UNVERIFIED and "Traceback" not in done.stderr
            assert path.name in done.stderr or "sha256 differs" in done.stderr or "archive is damaged" in done.stderr
            path.write_bytes(content)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["kit"]


@pytest.mark.parametrize("content", [None, b"", b"garbage", b"\xff", b"0" * 64 + b"  ../../etc/passwd\n"], ids=ascii)
def test_damaged_sums_are_refused(content: bytes | None, kit: Path, tmp_path: Path, keys: Pair) -> None:
    (kit / "SHA256SUMS").unlink()
    if content is not None:
        (kit / "SHA256SUMS").write_bytes(content)
    done = unpack(kit, tmp_path / "back", "--key", keys.public)
    assert done.returncode == EXIT_UNVERIFIED and "Traceback" not in done.stderr


def test_a_kit_without_its_verifier_says_so(kit: Path, tmp_path: Path, keys: Pair) -> None:
    (kit / "verify.py").unlink()
    done = unpack(kit, tmp_path / "back", "--key", keys.public)
    assert done.returncode == 69 and "verify.py" in done.stderr and "Traceback" not in done.stderr


def test_a_kit_of_another_signer_is_refused(kit: Path, tmp_path: Path, keys: Pair, release: Path) -> None:
    flipped(kit / "model.sig")
    done = unpack(kit, tmp_path / "back", "--key", keys.public)
    assert done.returncode == EXIT_UNVERIFIED and "model.sig" in done.stderr


def member(
    name: str, content: bytes = b"", kind: bytes = tarfile.REGTYPE, link: str = ""
) -> tuple[tarfile.TarInfo, bytes]:
    info = tarfile.TarInfo(name)
    info.size, info.type, info.linkname = len(content), kind, link
    return info, content


def as_stream(*members: tuple[tarfile.TarInfo, bytes], form: int = tarfile.PAX_FORMAT) -> io.BytesIO:
    made = io.BytesIO()
    with tarfile.open(fileobj=made, mode="w", format=form) as archive:
        for info, content in members:
            archive.addfile(info, io.BytesIO(content))
    made.seek(0)
    return made


A = hashlib.sha256(b"a").hexdigest()
EMPTY = hashlib.sha256(b"").hexdigest()
GOOD = member("good", b"a")


def test_headers_of_headers_are_refused(tmp_path: Path) -> None:
    """tarfile follows them one inside the other."""
    info = tarfile.TarInfo("x")
    info.pax_headers = {"comment": "x"}
    extended = info.tobuf(tarfile.PAX_FORMAT)[:1024]
    assert extended[156:157] == tarfile.XHDTYPE
    stream = io.BytesIO(extended * 5000 + as_stream(GOOD).getvalue())
    with pytest.raises(verifier.VerificationError, match="RecursionError"):
        unpacker.extract(stream, {"good": A}, tmp_path, verifier)


HOSTILE: dict[str, tuple[tuple[tarfile.TarInfo, bytes], ...]] = {
    "climbs": (GOOD, member("../climbed", b"a")),
    "is absolute": (GOOD, member("/tmp/glmexport-absolute", b"a")),
    "is not signed": (GOOD, member("more", b"a")),
    "comes twice": (GOOD, GOOD),
    "comes in another case": (GOOD, member("GOOD", b"a")),
    "is a link": (GOOD, member("empty", kind=tarfile.SYMTYPE, link="/etc/passwd")),
    "is a hard link": (GOOD, member("empty", kind=tarfile.LNKTYPE, link="good")),
    "is a pipe": (GOOD, member("empty", kind=tarfile.FIFOTYPE)),
    "is a device": (GOOD, member("empty", kind=tarfile.CHRTYPE)),
    "is a folder": (GOOD, member("empty", kind=tarfile.DIRTYPE)),
    "is a sparse file": (GOOD, member("empty", kind=tarfile.GNUTYPE_SPARSE)),
    "is another file": (member("good", b"b"), member("empty")),
    "is longer": (member("good", b"aa"), member("empty")),
    "is missing": (GOOD,),
    "a link before a file below it": (member("empty", kind=tarfile.SYMTYPE, link="/tmp"), GOOD),
}


@pytest.mark.parametrize("members", HOSTILE.values(), ids=HOSTILE)
def test_a_hostile_archive_is_refused(members: tuple[tuple[tarfile.TarInfo, bytes], ...], tmp_path: Path) -> None:
    target = tmp_path / "target"
    target.mkdir()
    with pytest.raises(verifier.VerificationError):
        unpacker.extract(as_stream(*members), {"good": A, "empty": EMPTY}, target, verifier)
    assert {path.name for path in tmp_path.rglob("*")} <= {"target", "good", "empty"}
    assert not any(path.is_symlink() for path in tmp_path.rglob("*"))
    assert not Path("/tmp/glmexport-absolute").exists()


def with_headers(content: bytes = b"a", **headers: str) -> bytes:
    """An archive of one file, about which an extended header says more."""
    info, _ = member("good", content)
    info.pax_headers = {name.replace("_", "."): value for name, value in headers.items()}
    return as_stream((info, content)).getvalue()


def header(kind: bytes, size: int, content: bytes = b"") -> bytes:
    """A header of some kind that says that so many bytes follow; and what does."""
    info = tarfile.TarInfo("good")
    info.type, info.size = kind, size
    return info.tobuf(tarfile.GNU_FORMAT) + content + bytes(-len(content) % 512)


LARGE = 200 << 20
SPARSE = {"GNU_sparse_name": "good", "GNU_sparse_realsize": str(1 << 62)}
GREEDY: dict[str, Callable[[], bytes]] = {
    "a long header": lambda: header(tarfile.XHDTYPE, LARGE, bytes(LARGE)) + as_stream(GOOD).getvalue(),
    "a long name": lambda: header(tarfile.GNUTYPE_LONGNAME, LARGE, bytes(LARGE)) + as_stream(GOOD).getvalue(),
    "a long link": lambda: header(tarfile.GNUTYPE_LONGLINK, LARGE, bytes(LARGE)) + as_stream(GOOD).getvalue(),
    "a long header for all": lambda: header(tarfile.XGLTYPE, LARGE, bytes(LARGE)) + as_stream(GOOD).getvalue(),
    "a header that ends nowhere": lambda: header(tarfile.XHDTYPE, 1 << 62),
    "a file that ends nowhere": lambda: header(tarfile.REGTYPE, 1 << 62),
    "a file of less than nothing": lambda: header(tarfile.REGTYPE, -(1 << 40)),
    "a size in a header": lambda: with_headers(size=str(1 << 62)),
    "holes": lambda: with_headers(**SPARSE, GNU_sparse_major="1", GNU_sparse_minor="0"),
    "many holes": lambda: with_headers(
        b"%d\n" % (1 << 24) + b"0\n" * (1 << 25), **SPARSE, GNU_sparse_major="1", GNU_sparse_minor="0"
    ),
    "holes as listed": lambda: with_headers(GNU_sparse_map="0,0", GNU_sparse_size=str(1 << 62), GNU_sparse_name="good"),
    "holes as numbered": lambda: with_headers(GNU_sparse_size=str(1 << 62), GNU_sparse_numblocks="1"),
    "more behind the end": lambda: as_stream(GOOD).getvalue() + bytes(LARGE),
}


@pytest.mark.parametrize("made", GREEDY.values(), ids=GREEDY)
def test_an_archive_takes_no_more_than_it_has(made: Callable[[], bytes], tmp_path: Path) -> None:
    """Neither of memory nor of the disk."""
    stream = io.BytesIO(made())
    tracemalloc.start()
    try:
        with pytest.raises(verifier.VerificationError):
            unpacker.extract(stream, {"good": A}, tmp_path, verifier)
        assert tracemalloc.get_traced_memory()[1] < 8 << 20
    finally:
        tracemalloc.stop()
    assert sum(path.stat().st_size for path in tmp_path.rglob("*")) <= 1 << 20


def test_a_volume_that_no_disk_has_room_for_is_refused(kit: Path, tmp_path: Path, keys: Pair) -> None:
    with max(kit.glob("bundle.tar.*")).open("r+b") as file:
        file.truncate(1 << 43)
    done = unpack(kit, tmp_path / "back", "--key", keys.public)
    assert done.returncode == 69 and "has room for" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["kit"]


def test_a_blob_that_no_disk_has_room_for_is_refused(layout: Path, tmp_path: Path) -> None:
    _, content, image = read_layout(layout)
    blob = layout / "blobs" / "sha256" / image.layers[0].hex
    with blob.open("r+b") as file:
        file.truncate(1 << 43)
    table = json.loads(content)
    table["layers"][0]["size"] = 1 << 43
    write_manifest(layout, json.dumps(table).encode())
    with pytest.raises(MachineError, match="has room for"):
        unpack_layout(layout, tmp_path / "back", nothing, Silent())
    assert [path.name for path in tmp_path.iterdir()] == ["layout"]


@pytest.mark.parametrize("form", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT])
def test_an_honest_archive_is_extracted(form: int, tmp_path: Path) -> None:
    unpacker.extract(as_stream(GOOD, member("empty"), form=form), {"good": A, "empty": EMPTY}, tmp_path, verifier)
    assert tree(tmp_path) == {"good": A, "empty": EMPTY}


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=80, deadline=None)
@given(st.integers(0, 5119), st.integers(1, 255))
def test_an_archive_with_any_byte_changed_gives_the_files_or_is_refused(
    tmp_path_factory: pytest.TempPathFactory, at: int, change: int
) -> None:
    # The name of the second is too long for a plain header, so that extended ones are among the bytes.
    long = "long/" * 60 + "empty"
    content = bytearray(as_stream(GOOD, member(long)).getvalue())
    content[at] ^= change
    target = tmp_path_factory.mktemp("target")
    try:
        unpacker.extract(io.BytesIO(bytes(content)), {"good": A, long: EMPTY}, target, verifier)
    except verifier.VerificationError:
        pass
    else:
        assert tree(target) == {"good": A, long: EMPTY}
    shutil.rmtree(target)


def test_the_scripts_need_python_alone() -> None:
    source = Path(unpacker.__file__).read_text(encoding="utf-8")
    parsed = ast.parse(source, feature_version=(3, 9))
    imported = {
        alias.name.split(".")[0] for node in ast.walk(parsed) if isinstance(node, ast.Import) for alias in node.names
    }
    imported |= {str(node.module) for node in ast.walk(parsed) if isinstance(node, ast.ImportFrom)}
    assert imported <= sys.stdlib_module_names


def test_the_command_line(run: Run, signed: Path, tmp_path: Path, keys: Pair) -> None:
    layout, back = tmp_path / "layout", tmp_path / "back"
    told = run("package", signed, "--oci", layout, "--tag", "r7", "--json")
    assert told.code == 0 and told.document["image"] == read_layout(layout)[0]
    index = json.loads((layout / "index.json").read_bytes())
    assert index["manifests"][0]["annotations"]["org.opencontainers.image.ref.name"] == "r7"
    told = run("package", signed, "--kit", tmp_path / "kit", "--volume-size", "64KiB", "--json")
    assert told.code == 0 and told.document["volumes"][0] == "bundle.tar.000"
    assert run("unpack", layout, "-o", back).code == EXIT_INPUT
    assert run("unpack", layout, "-o", back, "--no-verify", "--key", keys.public).code == EXIT_INPUT
    told = run("unpack", layout, "-o", back, "--key", keys.public, "--newer-than", str(COUNTER))
    assert told.code == EXIT_UNVERIFIED and not back.exists()
    told = run("unpack", layout, "-o", back, "--key", keys.public, "--json")
    assert told.code == 0 and told.document["counter"] == COUNTER
    told = run("unpack", layout, "-o", tmp_path / "unverified", "--no-verify")
    assert told.code == 0 and "nobody vouches" in told.stderr
    assert run("package", signed).code == EXIT_INPUT
    assert run("package", signed, "--kit", tmp_path / "small", "--volume-size", "1").code == EXIT_INPUT
    assert run("unpack", tmp_path / "kit", "-o", tmp_path / "x", "--key", keys.public).code == EXIT_INPUT


def test_signed_garbage_is_refused_on_arrival(release: Path, tmp_path: Path, keys: Pair) -> None:
    """A layout may be whole and its bundle not be one."""
    (release / "release.json").write_text("{}")
    resign(release, keys.private)
    write_layout(Bundle.open(release), tmp_path / "layout", Silent())
    with pytest.raises(UnverifiedError, match=r"release\.json"):
        unpack_layout(tmp_path / "layout", tmp_path / "back", lambda bundle: verify(bundle, keys.public), Silent())
    assert not (tmp_path / "back").exists()
