"""Input that cannot be used: a code, a message that names it, a next step, and nothing left behind."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from builds import FORMATS, RECIPE, TARGET, THREADS, Outcome, Run, Sample, small_checkpoint, write_recipe, write_target
from safetensors.torch import load_file, save_file

from glmexport.calibration.corpus import user_documents
from glmexport.foundation.errors import EXIT_INPUT, EXIT_MACHINE
from glmexport.tokenizer.tokenizer import Tokenizer

WEIGHTS = "model.safetensors"
GATE_UP = "model.layers.1.mlp.gate_up_proj.weight"


def check(outcome: Outcome, code: int, *words: str) -> None:
    """``words`` are in the message, the message has a next step, and nobody sees a traceback."""
    text = outcome.stdout + outcome.stderr
    assert outcome.code == code, text
    assert "Traceback" not in text
    assert outcome.stdout == ""
    message, _, next_step = outcome.stderr[outcome.stderr.index("ERROR ") :].partition("\n")
    for word in words:
        assert word in message + next_step
    # The next step is one indented line, a sentence, and the last thing that is said.
    assert next_step.startswith("      ") and next_step.endswith((".\n", "?\n", ":\n"))
    assert next_step.count("\n") == 1 and len(next_step.strip()) >= 8
    assert not message.endswith(("..", ". ."))


def everything(directory: Path) -> set[str]:
    return {path.relative_to(directory).as_posix() for path in directory.rglob("*")}


class Place:
    """Where outputs go: a directory that must stay as it is, whatever is tried."""

    def __init__(self, path: Path) -> None:
        path.mkdir()
        self.path = path
        #: Two levels below, so that a parent which was made and left behind shows.
        self.output = path / "new" / "bundle"

    def untouched(self) -> bool:
        return not everything(self.path)

    def only_work(self) -> bool:
        """Nothing but what a later attempt goes on from."""
        left = {path.name for path in self.output.parent.iterdir()}
        return all(name.startswith(".glmexport-work-") for name in left)


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path / "place")


@pytest.fixture
def unread(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading a checkpoint takes minutes: what can be refused before that is."""

    def read(path: Path, *_: object) -> None:
        raise AssertionError(f"{path} was read in whole")

    monkeypatch.setattr("glmexport.foundation.digests._read", read)


@pytest.fixture
def checkpoint(sample: Sample, tmp_path: Path) -> Path:
    """A copy that may be damaged."""
    return Path(shutil.copytree(sample.checkpoint, tmp_path / "checkpoint"))


@pytest.fixture
def build(run: Run, sample: Sample, place: Place) -> Callable[..., Outcome]:
    """``glmexport build`` with everything right but what a test adds."""

    def call(checkpoint: Path | str = sample.checkpoint, *more: str | Path, **changes: Any) -> Outcome:
        options = {
            "--target": TARGET,
            "--recipe": sample.recipe,
            "-o": place.output,
            "--threads": THREADS,
        } | {f"--{name.replace('_', '-')}": value for name, value in changes.items()}
        if "--output" in options:
            options.pop("-o")
        flat = [str(item) for pair in options.items() if pair[1] is not None for item in pair]
        return run("build", checkpoint, *flat, *more)

    return call


def edit_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | changes), encoding="utf-8")


def edit_weights(checkpoint: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = load_file(checkpoint / WEIGHTS)
    change(tensors)
    save_file(tensors, checkpoint / WEIGHTS, metadata={"format": "pt"})


def truncate(checkpoint: Path) -> None:
    path = checkpoint / WEIGHTS
    path.write_bytes(path.read_bytes()[:-1000])


def wrong_shape(tensors: dict[str, torch.Tensor]) -> None:
    tensors[GATE_UP] = tensors[GATE_UP][:-1].contiguous()


def not_a_number(tensors: dict[str, torch.Tensor]) -> None:
    tensors[GATE_UP][3, 5] = float("nan")


def no_vocabulary(checkpoint: Path) -> None:
    path = checkpoint / "tokenizer.json"
    tokenizer = json.loads(path.read_text(encoding="utf-8"))
    tokenizer["model"]["vocab"] = {}
    path.write_text(json.dumps(tokenizer), encoding="utf-8")


def only_pickles(checkpoint: Path) -> None:
    (checkpoint / WEIGHTS).rename(checkpoint / "pytorch_model.bin")


def config(**changes: Any) -> Callable[[Path], None]:
    return lambda checkpoint: edit_json(checkpoint / "config.json", **changes)


def weights(change: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Path], None]:
    return lambda checkpoint: edit_weights(checkpoint, change)


DAMAGE: dict[str, tuple[Callable[[Path], Any], tuple[str, ...]]] = {
    "truncated shard": (truncate, (WEIGHTS, "1,000 of", "missing", "again")),
    "wrong shape": (weights(wrong_shape), (GATE_UP, "[511, 128]", "[512, 128]", "config.json")),
    "missing tensor": (weights(lambda tensors: tensors.pop(GATE_UP)), ("lacks", GATE_UP, "config.json")),
    "unknown tensor": (
        weights(lambda tensors: tensors.update({"model.extra.weight": torch.zeros(2)})),
        ("model.extra.weight", "does not know"),
    ),
    "unknown family": (config(model_type="llama"), ("'llama'", "Supported: glm, glm4")),
    "unknown activation": (config(hidden_act="gelu"), ("config.json", "hidden_act", '"gelu"', "silu")),
    "unknown rope type": (
        config(rope_parameters={"rope_type": "longrope", "rope_theta": 1e4, "partial_rotary_factor": 0.5}),
        ("config.json", "rope_type", '"longrope"', "yarn"),
    ),
    "no config": (lambda checkpoint: (checkpoint / "config.json").unlink(), ("config.json",)),
    "config is no JSON": (
        lambda checkpoint: (checkpoint / "config.json").write_text("{", encoding="utf-8"),
        ("config.json", "line 1"),
    ),
    "a larger vocabulary than the model's": (
        lambda checkpoint: (
            edit_json(checkpoint / "config.json", vocab_size=256, pad_token_id=0, eos_token_id=1),
            edit_json(checkpoint / "generation_config.json", pad_token_id=0, eos_token_id=1),
            edit_weights(
                checkpoint,
                lambda tensors: tensors.update(
                    {key: tensors[key][:256].clone() for key in ("model.embed_tokens.weight", "lm_head.weight")}
                ),
            ),
        ),
        ("262 tokens", "256"),
    ),
    "an end token beyond the vocabulary": (
        config(eos_token_id=[256, 264]), ("config.json", "eos_token_id", "264", "at most 263")
    ),
    "no end token": (
        lambda checkpoint: edit_json(checkpoint / "generation_config.json", eos_token_id=[]),
        ("generation_config.json", "eos_token_id", "no answer ends"),
    ),
    "more layers than tensors": (config(num_hidden_layers=10**6), ("config.json", "num_hidden_layers", "1000000")),
    "no tokenizer": (lambda checkpoint: (checkpoint / "tokenizer.json").unlink(), ("tokenizer.json", "vocabulary")),
    "tokenizer without vocabulary": (no_vocabulary, ("tokenizer.json", "without vocabulary")),
    "auto_map": (config(auto_map={"AutoModel": "modeling.Model"}), ("config.json", "auto_map", "never run")),
    "code": (
        lambda checkpoint: (checkpoint / "modeling_glm.py").write_text("raise SystemExit", encoding="utf-8"),
        ("modeling_glm.py", "never run"),
    ),
    "only pickles": (only_pickles, ("pytorch_model.bin", "safetensors")),
}


@pytest.mark.usefixtures("unread")
@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_checkpoint(name: str, checkpoint: Path, place: Place, build: Callable[..., Outcome]) -> None:
    damage, words = DAMAGE[name]
    damage(checkpoint)
    check(build(checkpoint), EXIT_INPUT, *words)
    assert place.untouched()


def test_a_weight_that_is_not_a_number_is_found_while_quantizing(
    checkpoint: Path, place: Place, build: Callable[..., Outcome]
) -> None:
    edit_weights(checkpoint, not_a_number)
    check(build(checkpoint), EXIT_INPUT, WEIGHTS, GATE_UP, "not finite", "[3, 5]")
    assert place.only_work()


@pytest.mark.parametrize("verb", ["build", "inspect"])
def test_no_such_directory(verb: str, run: Run, place: Place) -> None:
    outcome = run(verb, place.path / "absent", *(["-o", place.output] if verb == "build" else []))
    check(outcome, EXIT_INPUT, str(place.path / "absent"), "hub id")
    assert place.untouched()


def test_a_hub_id_without_network(build: Callable[..., Outcome], place: Place) -> None:
    check(build("nobody/nothing"), EXIT_MACHINE, "nobody/nothing", "HF_HUB_OFFLINE")
    assert place.untouched()


def recipe_with(line: str) -> Callable[[Path], Path]:
    return lambda directory: write_recipe(directory, f"{line}\nsummary = 'x'\n{FORMATS}", "wrong")


OPTIONS: dict[str, tuple[dict[str, str | Callable[[Path], Path]], int, tuple[str, ...]]] = {
    "unknown target": ({"target": "x86-avx512-vni"}, EXIT_INPUT, ("'x86-avx512-vni'", "'x86-avx512-vnni'", TARGET)),
    "target of nothing known": ({"target": "q"}, EXIT_INPUT, ("'q'", "Known:", TARGET)),
    "no target file": ({"target": "absent.toml"}, EXIT_INPUT, ("absent.toml", TARGET)),
    "target that climbs": ({"target": "../targets/x86-avx2"}, EXIT_INPUT, ("../targets/x86-avx2",)),
    "target with a value out of range": (
        {"target": lambda directory: write_target(directory, {"accuracy_level = 4": "accuracy_level = 9"}, "wrong")},
        EXIT_INPUT,
        ("wrong.toml", "weights.accuracy_level"),
    ),
    "unknown recipe": ({"recipe": "w4g23"}, EXIT_INPUT, ("'w4g23'", "'w4g32'")),
    "no recipe file": ({"recipe": "absent.toml"}, EXIT_INPUT, ("absent.toml", "w4g32")),
    "recipe with an unknown key": ({"recipe": recipe_with("colour = 'red'")}, EXIT_INPUT, ("wrong.toml", "colour")),
    "recipe that is no TOML": ({"recipe": recipe_with("= =")}, EXIT_INPUT, ("wrong.toml", "not TOML", "line 1")),
    "recipe with a value out of range": (
        {"recipe": lambda directory: write_recipe(directory, "summary = 'x'\n[linears]\nbits = 3", "wrong")},
        EXIT_INPUT,
        ("wrong.toml", "linears.bits"),
    ),
    "a format that the target has no kernels for": (
        {
            "target": lambda directory: write_target(directory, {"bits = [2, 4, 8]": "bits = [8]"}, "eight"),
            "recipe": "rtn-w4g32",
        },
        EXIT_INPUT,
        ("rtn-w4g32", "w4g32", "eight", "8 bits"),
    ),
    "groups that do not divide an embedding's rows": (
        {"recipe": lambda directory: write_recipe(directory, RECIPE.replace("= 32", "= 256"), "wide")},
        EXIT_INPUT,
        ("wide", "256", "128", "embedding.group_size"),
    ),
    "two limits": ({"size": "1GiB", "bpw": "4.5"}, EXIT_INPUT, ("--size", "--bpw")),
    "a limit that no format fits": ({"bpw": "1.5"}, EXIT_INPUT, ("MiB", "--bpw", "candidates")),
    "a limit without calibration": ({"bpw": "4.5", "recipe": "rtn-w4g32"}, EXIT_INPUT, ("rtn-w4g32", "--bpw")),
    "too little memory": ({"max_memory": "1MiB"}, EXIT_MACHINE, ("GiB", "--max-memory")),
    "no threads": ({"threads": "0"}, EXIT_INPUT, ("--threads",)),
}


@pytest.mark.usefixtures("unread")
@pytest.mark.parametrize("name", OPTIONS)
def test_an_option_that_cannot_be_used(
    name: str, tmp_path: Path, sample: Sample, place: Place, build: Callable[..., Outcome]
) -> None:
    changes, code, words = OPTIONS[name]
    made = {key: value(tmp_path) if callable(value) else value for key, value in changes.items()}
    outcome = build(sample.checkpoint, **made)
    if "threads" in made:
        usage(outcome, *words)
    else:
        check(outcome, code, *words)
    assert place.untouched()


def usage(outcome: Outcome, *words: str) -> None:
    """A line that cannot be parsed: click says what is wrong and how to get help."""
    assert outcome.code == EXIT_INPUT
    assert outcome.stdout == "" and "Traceback" not in outcome.stderr
    assert "--help" in outcome.stderr
    for word in words:
        assert word in outcome.stderr


@pytest.mark.parametrize("value", ["lots", "8 GiBs", "-1GiB", "", "1e9"])
def test_a_memory_limit_that_is_no_size(value: str, build: Callable[..., Outcome], place: Place) -> None:
    usage(build(max_memory=value), "--max-memory", repr(value), "8GiB")
    assert place.untouched()


@pytest.mark.parametrize(
    "arguments", [["bild"], ["build"], ["run", "x"], ["validate", "x"], ["build", "demo", "--colour"]]
)
def test_a_line_that_cannot_be_parsed(arguments: list[str], run: Run) -> None:
    usage(run(*arguments))


@pytest.mark.usefixtures("unread")
def test_two_targets_of_one_name(tmp_path: Path, sample: Sample, place: Place, build: Callable[..., Outcome]) -> None:
    files = []
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        files.append(write_target(tmp_path / folder, {}, "same"))
    outcome = build(sample.checkpoint, "--target", files[1], target=files[0])
    check(outcome, EXIT_INPUT, "same")
    assert place.untouched()


def text_file(name: str, content: bytes) -> Callable[[Path], Path]:
    def write(directory: Path) -> Path:
        (directory / name).write_bytes(content)
        return directory / name

    return write


USER_RECIPE = f"summary = 'User text only'\n{FORMATS}\n[calibration]\ntokens = 2048\nsequence_length = 64\n"
CALIBRATION: dict[str, tuple[Callable[[Path], Path], tuple[str, ...]]] = {
    "too small": (text_file("short.txt", b"Too short."), ("too small", "of 2048", "--calibration")),
    "empty": (text_file("empty.jsonl", b""), ("too small", "0 tokens", "--calibration")),
    "missing": (lambda directory: directory / "absent.txt", ("absent.txt", "No such file")),
    "a directory": (lambda directory: directory, ("directory",)),
    "wrong extension": (text_file("text.md", b"# Text"), ("text.md", ".txt", ".jsonl")),
    "not UTF-8": (text_file("latin.txt", b"\xe9t\xe9"), ("latin.txt", "UTF-8")),
    "no JSON in a line": (text_file("bad.jsonl", b'{"text": "fine"}\n{"text": '), ("bad.jsonl, line 2", '"text"')),
    "no text in a line": (text_file("bad.jsonl", b'{"title": "x"}'), ("bad.jsonl, line 1", "'messages'")),
    "text that is no text": (text_file("bad.jsonl", b'{"text": 3}'), ("bad.jsonl, line 1",)),
    "messages that are none": (text_file("bad.jsonl", b'{"messages": [1, 2]}'), ("bad.jsonl, line 1",)),
    "messages without role": (text_file("bad.jsonl", b'{"messages": [{"content": "x"}]}'), ("bad.jsonl, line 1",)),
    "no messages": (text_file("bad.jsonl", b'{"messages": []}'), ("bad.jsonl, line 1",)),
}


@pytest.mark.usefixtures("unread")
@pytest.mark.parametrize("name", CALIBRATION)
def test_calibration_text_that_cannot_be_used(
    name: str, tmp_path: Path, sample: Sample, place: Place, build: Callable[..., Outcome]
) -> None:
    make, words = CALIBRATION[name]
    recipe = write_recipe(tmp_path, f"{USER_RECIPE}quota = {{ user = 1 }}\n", "user")
    outcome = build(sample.checkpoint, recipe=recipe, calibration=make(tmp_path))
    check(outcome, EXIT_INPUT, *words)
    assert place.untouched()


def test_only_line_feeds_end_a_line(sample: Sample, tmp_path: Path) -> None:
    texts = ["a\u2028b", "c\x85d\x0ce"]
    lines = "\r\n".join(json.dumps({"text": text}, ensure_ascii=False) for text in texts)
    (tmp_path / "own.jsonl").write_bytes(lines.encode())
    documents = user_documents([tmp_path / "own.jsonl"], Tokenizer.open(sample.checkpoint))
    assert [document.text for document in documents] == texts


@pytest.mark.usefixtures("unread")
def test_calibration_text_for_a_recipe_without(tmp_path: Path, place: Place, build: Callable[..., Outcome]) -> None:
    path = text_file("own.txt", b"text")(tmp_path)
    check(build(recipe="rtn-w4g32", calibration=path), EXIT_INPUT, "rtn-w4g32", "--calibration")
    assert place.untouched()


@pytest.mark.usefixtures("unread")
def test_a_language_that_no_text_has(
    tmp_path: Path, place: Place, build: Callable[..., Outcome]
) -> None:
    recipe = write_recipe(tmp_path, f"{USER_RECIPE}quota = {{ tlh = 1 }}\n", "klingon")
    check(build(recipe=recipe), EXIT_INPUT, "too small", "0 tokens")
    assert place.untouched()


# Where the bundle goes


@pytest.mark.usefixtures("unread")
def test_an_output_below_a_file(place: Place, build: Callable[..., Outcome]) -> None:
    (place.path / "file").write_text("mine", encoding="utf-8")
    outcome = build(output=place.path / "file" / "bundle")
    check(outcome, EXIT_MACHINE, str(place.path / "file"), "-o")
    assert everything(place.path) == {"file"}
    assert (place.path / "file").read_text(encoding="utf-8") == "mine"


@pytest.mark.usefixtures("unread")
def test_a_full_disk(place: Place, build: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch) -> None:
    nothing = SimpleNamespace(free=1000)
    monkeypatch.setattr("glmexport.foundation.disk.shutil.disk_usage", lambda _: nothing)
    check(build(), EXIT_MACHINE, "of disk", "free", "-o")
    assert place.untouched()


@pytest.fixture
def mount(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """A file system of that size."""
    mounted = []

    def make(size: str) -> Path:
        where = tmp_path / "disk"
        where.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(where)]
        if shutil.which("mount") is None or subprocess.run(command, capture_output=True, check=False).returncode:
            pytest.skip("mounting is not permitted here")
        mounted.append(where)
        return where

    yield make
    for where in mounted:
        subprocess.run(["umount", "--lazy", str(where)], check=True)


@pytest.mark.usefixtures("unread")
def test_a_small_disk(build: Callable[..., Outcome], mount: Callable[[str], Path]) -> None:
    disk = mount("1m")
    check(build(output=disk / "new" / "bundle"), EXIT_MACHINE, str(disk), "of disk", "free")
    assert not everything(disk)


@pytest.mark.parametrize("size", ["20k", "80k", "600k", "1200k"])
@pytest.mark.parametrize("recipe", [None, "rtn-w4g32"])
def test_a_disk_that_fills_up_meanwhile(
    size: str, recipe: str | None, sample: Sample, build: Callable[..., Outcome], mount: Callable[[str], Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    disk = mount(size)
    roomy = SimpleNamespace(free=1 << 40)
    monkeypatch.setattr("glmexport.foundation.disk.shutil.disk_usage", lambda _: roomy)
    outcome = build(output=disk / "bundle", recipe=recipe or sample.recipe)
    check(outcome, EXIT_MACHINE, "No space left", "same command")
    assert all(path.name.startswith(".glmexport-work-") for path in disk.iterdir())


@pytest.mark.usefixtures("unread")
def test_an_output_that_exists(sample: Sample, tmp_path: Path, build: Callable[..., Outcome]) -> None:
    bundle = Path(shutil.copytree(sample.bundle, tmp_path / "own" / "bundle"))
    before = everything(bundle)
    check(build(output=bundle), EXIT_INPUT, str(bundle), "exists", "--force")
    assert everything(bundle) == before
    assert [path.name for path in bundle.parent.iterdir()] == ["bundle"]


@pytest.mark.usefixtures("unread")
def test_force_replaces_only_bundles(place: Place, sample: Sample, build: Callable[..., Outcome]) -> None:
    own = place.path / "thesis"
    own.mkdir()
    (own / "chapter.txt").write_text("mine", encoding="utf-8")
    check(build(sample.checkpoint, "--force", output=own), EXIT_INPUT, str(own), "not a bundle", "-o")
    assert everything(place.path) == {"thesis", "thesis/chapter.txt"}


@pytest.mark.usefixtures("unread")
def test_force_does_not_replace_a_file(place: Place, sample: Sample, build: Callable[..., Outcome]) -> None:
    own = place.path / "file"
    own.write_text("mine", encoding="utf-8")
    check(build(sample.checkpoint, "--force", output=own), EXIT_INPUT, str(own), "not a bundle")
    assert own.read_text(encoding="utf-8") == "mine"


def test_force_keeps_the_old_bundle_when_the_new_one_fails(
    sample: Sample, checkpoint: Path, tmp_path: Path, build: Callable[..., Outcome]
) -> None:
    bundle = Path(shutil.copytree(sample.bundle, tmp_path / "own" / "bundle"))
    before = everything(bundle)
    edit_weights(checkpoint, not_a_number)
    check(build(checkpoint, "--force", output=bundle), EXIT_INPUT, GATE_UP)
    assert everything(bundle) == before


# Bundles


def flip(bundle: Path) -> str:
    path = next(iter(sorted((bundle / "weights").iterdir())))
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    return path.name


def remove(bundle: Path) -> str:
    (bundle / "scoring.onnx").unlink()
    return "scoring.onnx"


def add(bundle: Path) -> str:
    (bundle / "weights" / "more.data").write_bytes(b"x")
    return "weights/more.data"


def link(bundle: Path) -> str:
    path = bundle / "model.onnx"
    path.rename(bundle.parent / "elsewhere.onnx")
    path.symlink_to(bundle.parent / "elsewhere.onnx")
    return "model.onnx"


def link_inside(bundle: Path) -> str:
    """Whose bytes are right, and which onnxruntime-genai follows all the same."""
    shutil.copyfile(bundle / "model.onnx", bundle / "report.html")
    (bundle / "model.onnx").unlink()
    (bundle / "model.onnx").symlink_to("report.html")
    return "model.onnx"


def link_a_folder(bundle: Path) -> str:
    (bundle / "weights").rename(bundle.parent / "weights")
    (bundle / "weights").symlink_to(bundle.parent / "weights")
    return "weights"


def add_a_folder_link(bundle: Path) -> str:
    (bundle / "more").symlink_to(bundle.parent)
    return "more"


def no_manifest(bundle: Path) -> str:
    (bundle / "bundle.json").unlink()
    return "bundle.json"


def later_version(bundle: Path) -> str:
    edit_json(bundle / "bundle.json", version=2)
    return "bundle.json"


def broken_manifest(bundle: Path) -> str:
    (bundle / "bundle.json").write_bytes(b"\xff{")
    return "bundle.json"


def climbing_manifest(bundle: Path) -> str:
    (bundle.parent / "outside").write_bytes(b"")
    manifest = json.loads((bundle / "bundle.json").read_text(encoding="utf-8"))
    empty = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
    manifest["files"].append({"path": "../outside", "size": 0, "sha256": empty})
    (bundle / "bundle.json").write_text(json.dumps(manifest), encoding="utf-8")
    return "outside"


CHANGES = [
    flip,
    remove,
    add,
    link,
    link_inside,
    link_a_folder,
    add_a_folder_link,
    no_manifest,
    later_version,
    broken_manifest,
    climbing_manifest,
]


@pytest.mark.parametrize("verb", ["run", "validate"])
@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_bundle(
    verb: str, change: Callable[[Path], str], sample: Sample, tmp_path: Path, run: Run
) -> None:
    bundle = Path(shutil.copytree(sample.bundle, tmp_path / "bundle"))
    named = change(bundle)
    before = everything(tmp_path)
    more = ["-p", "hello"] if verb == "run" else ["--against", sample.checkpoint]
    check(run(verb, bundle, *more, "--threads", THREADS), EXIT_INPUT, str(bundle), named)
    assert everything(tmp_path) == before


@pytest.mark.parametrize("verb", ["run", "validate"])
def test_no_bundle(verb: str, sample: Sample, tmp_path: Path, run: Run) -> None:
    more = ["-p", "hello"] if verb == "run" else ["--against", sample.checkpoint]
    for where in (tmp_path, tmp_path / "absent", sample.checkpoint / "config.json"):
        check(run(verb, where, *more), EXIT_INPUT, str(where), "bundle.json", "glmexport build")
    assert not everything(tmp_path)


def test_validation_against_another_checkpoint(sample: Sample, tmp_path: Path, run: Run) -> None:
    bundle = Path(shutil.copytree(sample.bundle, tmp_path / "bundle"))
    report = (bundle / "report.json").read_bytes()
    small_checkpoint(tmp_path / "other", seed=1)
    outcome = run("validate", bundle, "--against", tmp_path / "other", "--threads", THREADS)
    check(outcome, EXIT_INPUT, "checkpoint", "other", "sha256:", "--against")
    assert (bundle / "report.json").read_bytes() == report


def test_a_prompt_that_fills_the_context(sample: Sample, run: Run) -> None:
    check(run("run", sample.bundle, "-p", "x" * 300, "--threads", THREADS), EXIT_INPUT, "256", "Shorten")
