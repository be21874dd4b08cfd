"""What a bundle or a target can make a runtime do: nothing but what a build writes, whichever file says so."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from builds import TARGET, Run, Sample, write_target
from forged import forge

from glmexport.bundle.genai_config import GenaiConfig
from glmexport.bundle.loop import LOOP_CONFIG, read_loop
from glmexport.bundle.manifest import MANIFEST
from glmexport.bundle.names import GENAI_CONFIG
from glmexport.foundation.errors import EXIT_INPUT, EXIT_PASS, BundleError
from glmexport.foundation.session_settings import PROVIDER_OPTIONS, SESSION_ENTRIES

#: Settings that name a library, or a file that is read or written; some by the name of onnxruntime-genai.
SETTINGS = [
    "custom_ops_library",
    "enable_profiling",
    "optimized_model_filepath",
    "ep.context_file_path",
    "ep.context_model_external_initializers_file_name",
    "session.collect_node_memory_stats_to_file",
    "session.enable_profiling",
    "session.moe.offload.derived_cache_dir",
    "session.moe.offload.popularity_file",
    "session.moe.offload.source_root",
    "session.moe_expert_counter_state_file",
    "session.node_partition_config_file",
    "session.optimized_model_external_initializers_file_name",
    "session.optimized_model_filepath",
    "session.model_external_initializers_file_folder_path",
    "session.load_model_format",
    "session.unheard_of",
]
OPTIONS = [
    "backend_path", "cache_dir", "ep_context_file_path", "load_config", "nv_runtime_cache_path", "profiling_file_path",
    "provider_factory_entry_point", "shared_lib_path", "trt_engine_cache_path", "trt_extra_plugin_lib_paths",
]  # fmt: skip
LOOP = {
    "graph": "model.onnx", "provider": {"name": "CPUExecutionProvider"}, "context_length": 8, "eos_token_id": [1],
    "input_ids": "a", "attention_mask": "b", "logits": "c", "caches": {},
}  # fmt: skip


@pytest.fixture
def bundle(sample: Sample, tmp_path: Path) -> Path:
    return Path(shutil.copytree(sample.bundle, tmp_path / "bundle"))


def asked(bundle: Path) -> list[str | Path | int]:
    return ["run", bundle, "-p", "Hello", "--max-tokens", 1, "--threads", 1]


def places(document: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Paths of every table in a document."""
    if isinstance(document, dict):
        yield at
        for key, value in document.items():
            yield from places(value, (*at, key))


def within(document: Any, at: tuple[Any, ...]) -> Any:
    for key in at:
        document = document[key]
    return document


@pytest.mark.parametrize("name", SETTINGS)
def test_a_setting_in_the_file_of_onnxruntime_genai(name: str, bundle: Path, run: Run, tmp_path: Path) -> None:
    target = tmp_path / "precious"
    target.write_text("mine")

    def change(config: Any) -> None:
        config["model"]["decoder"]["session_options"][name] = str(target)

    forge(bundle, GENAI_CONFIG, change)
    done = run(*asked(bundle))
    assert done.code == EXIT_INPUT and name in done.stderr and "Traceback" not in done.stderr
    assert target.read_text() == "mine"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bundle", "precious"]


@pytest.mark.parametrize("name", SETTINGS)
def test_a_setting_in_the_manifest(name: str, bundle: Path, run: Run) -> None:
    forge(bundle, MANIFEST, lambda manifest: manifest["target"]["session"]["config"].update({name: "x"}))
    done = run(*asked(bundle))
    assert done.code == EXIT_INPUT and name in done.stderr


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("provider", ["CPUExecutionProvider", *PROVIDER_OPTIONS, "UnheardExecutionProvider"])
def test_an_option_of_a_provider(name: str, provider: str, bundle: Path, run: Run, tmp_path: Path) -> None:
    written = {"name": provider, "options": {name: "/tmp/evil.so"}, "package": "x", "runtime": "onnxruntime"}
    forge(bundle, MANIFEST, lambda manifest: manifest["target"].update(provider=written))
    done = run(*asked(bundle))
    assert done.code == EXIT_INPUT and name in done.stderr
    line = f'name = "{provider}"\noptions = {{ {name} = "/tmp/evil.so" }}'
    target = write_target(tmp_path, {'name = "CPUExecutionProvider"': line}, "mine")
    done = run("targets", "show", target)
    assert done.code == EXIT_INPUT and name in done.stderr


@pytest.mark.parametrize("name", SETTINGS)
def test_a_setting_of_a_target(name: str, run: Run, tmp_path: Path) -> None:
    target = write_target(tmp_path, {"[gates]": f'[session.config]\n"{name}" = "1"\n\n[gates]'}, "mine")
    done = run("targets", "show", target)
    assert done.code == EXIT_INPUT and name in done.stderr


@pytest.mark.parametrize("change", [{"graph": "../model.onnx"}, {"session": {"config": {"custom_ops_library": "x"}}},
                                    {"provider": {"name": "CPUExecutionProvider", "options": {"shared_lib_path": "x"}}},
                                    {"provider": {"name": "../evil"}}, {"step_graph": "/x.onnx"}])  # fmt: skip
def test_a_setting_in_the_file_of_our_loop(change: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / LOOP_CONFIG).write_text(json.dumps(LOOP))
    assert read_loop(tmp_path)
    (tmp_path / LOOP_CONFIG).write_text(json.dumps({**LOOP, **change}))
    with pytest.raises(BundleError, match="not what a loop reads"):
        read_loop(tmp_path)


def test_settings_that_are_allowed_and_not_the_manifests(bundle: Path, run: Run) -> None:
    """The manifest is what is shown, measured and signed; a second opinion in another file is none."""
    options = {"session.intra_op.allow_spinning": "0"}
    forge(bundle, GENAI_CONFIG, lambda config: config["model"]["decoder"]["session_options"].update(options))
    done = run(*asked(bundle))
    assert done.code == EXIT_INPUT and "other settings" in done.stderr
    forge(bundle, MANIFEST, lambda manifest: manifest["target"]["session"].update(config=options))
    # In the order in which a build writes them.
    forge(bundle, GENAI_CONFIG, lambda config: config["model"]["decoder"].update(
        session_options={"log_id": "glmexport", **options, "provider_options": []}))  # fmt: skip
    assert run(*asked(bundle)).code == EXIT_PASS


def test_every_table_of_the_file_is_closed(bundle: Path) -> None:
    path = bundle / GENAI_CONFIG
    document = json.loads(path.read_text())
    every = list(places(document))
    assert len(every) >= 6
    for at in every:
        changed = json.loads(path.read_text())
        within(changed, at)["unheard_of"] = 1
        (bundle / "changed").mkdir(exist_ok=True)
        (bundle / "changed" / GENAI_CONFIG).write_text(json.dumps(changed, indent=2) + "\n")
        with pytest.raises(BundleError):
            GenaiConfig.read(bundle / "changed")


@pytest.mark.parametrize(
    ("at", "value"),
    [
        (("model", "type"), "whisper"),
        (("model", "decoder", "filename"), "../model.onnx"),
        (("model", "decoder", "inputs", "input_ids"), "other"),
        (("model", "decoder", "outputs", "logits"), "other"),
        (("search", "num_beams"), 64),
        (("search", "max_length"), 10**18),
        (("model", "pad_token_id"), 10**18),
        (("model", "eos_token_id"), [True]),
        (("model", "context_length"), "8"),
    ],
)
def test_a_value_that_no_build_writes(at: tuple[str, ...], value: Any, bundle: Path) -> None:
    path = bundle / GENAI_CONFIG
    document = json.loads(path.read_text())
    within(document, at[:-1])[at[-1]] = value
    path.write_text(json.dumps(document, indent=2) + "\n")
    with pytest.raises(BundleError, match=at[-1] if at[-1] not in ("input_ids", "logits") else "inputs"):
        GenaiConfig.read(bundle)


@pytest.mark.parametrize("spelling", ['{"a": 1, "model":', '{"model":', '/* */ {\n  "model":', '{\n  "m\\u006fdel":'])
def test_a_file_that_two_readers_may_read_differently(spelling: str, bundle: Path) -> None:
    """What was checked has to be what onnxruntime-genai reads: a key twice would be another one to each."""
    path = bundle / GENAI_CONFIG
    text = path.read_text()
    assert GenaiConfig.read(bundle)
    path.write_text(text.replace('{\n  "model":', spelling, 1))
    with pytest.raises(BundleError):
        GenaiConfig.read(bundle)
    twice = text.replace('"session_options": {', '"session_options": {"custom_ops_library": "x"}, "session_options": {')
    assert twice != text
    path.write_text(twice)
    with pytest.raises(BundleError, match=r"spelled|twice"):
        GenaiConfig.read(bundle)


@pytest.mark.parametrize("name", ["ops.so", "weights/ops.dll", "model2.onnx", "run.py", "weights/a/b.data", "x.pkl",
                                  "additional_chat_templates/../a.jinja", "plugin.dylib", "tokenizer.py"])  # fmt: skip
@pytest.mark.parametrize("verb", ["run", "sign", "targets"])
def test_a_file_of_a_kind_that_no_bundle_has(name: str, verb: str, bundle: Path, run: Run, tmp_path: Path) -> None:
    forge(bundle, MANIFEST, lambda manifest: manifest["files"].append({"path": name, "size": 1, "sha256": "0" * 64}))
    (bundle / name).parent.mkdir(parents=True, exist_ok=True)
    (bundle / name).write_bytes(b"\x7f")
    command = {
        "run": asked(bundle), "sign": ["sign", bundle, "--key", tmp_path / "k"], "targets": ["targets", "check", bundle]
    }  # fmt: skip
    done = run(*command[verb])
    assert done.code == EXIT_INPUT and "no build writes" in done.stderr


def test_a_graph_that_somebody_compiled(bundle: Path, run: Run) -> None:
    import onnx
    from onnx import helper

    graph = onnx.load(bundle / "model.onnx", load_external_data=False)
    graph.graph.node.append(helper.make_node("EPContext", [], [], domain="com.microsoft", ep_cache_context="/x.bin"))
    content = graph.SerializeToString()
    forge(bundle, "model.onnx", lambda _: content)
    done = run(*asked(bundle))
    assert done.code == EXIT_INPUT and "EPContext" in done.stderr


def test_what_is_allowed_names_no_file() -> None:
    """No value that may be chosen can be a path or a name of a library."""
    tables = [SESSION_ENTRIES, *PROVIDER_OPTIONS.values()]
    for pattern in (pattern for table in tables for pattern in table.values()):
        for text in ("x.so", "/x", "./x", "a\\b", "libx", "C:x", "x y", "x\n", ""):
            assert not pattern.fullmatch(text), (pattern, text)


def test_a_target_is_told_what_may_be_set(run: Run, tmp_path: Path) -> None:
    target = write_target(tmp_path, {"[gates]": '[session.config]\n"session.x" = "1"\n\n[gates]'}, "mine")
    done = run("targets", "show", target)
    assert "session.intra_op.allow_spinning" in done.stderr
    done = run("tune", "demo", "--target", TARGET, "--session-config", "session.x=1,2", "-o", tmp_path / "tuned.toml")
    assert done.code == EXIT_INPUT and "session.x" in done.stderr
