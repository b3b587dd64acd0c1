"""A checkpoint is whole or not there, and a change to any of its bytes is seen."""

import errno
import hashlib
import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import pytest

from quantize.checkpoint import (
    MANIFEST_NAME,
    CalibrationFacts,
    Checkpoint,
    Manifest,
    SourceFacts,
    find_checkpoints,
    open_checkpoint,
    seal,
    verify,
    writing,
)
from quantize.errors import UserError
from quantize.files import disk_is_full, hash_of_hashes, sha256_of
from quantize.schema import to_data


def manifest(name: str = "Tiny-AWQ", variant: str = "awq-gemm", base_model: str = "Tiny") -> Manifest:
    return Manifest(
        name=name,
        base_model=base_model,
        variant=variant,
        q_group_size=64,
        source=SourceFacts("hub", "org/Tiny", "0123abcd", "ff" * 32),
        calibration=CalibrationFacts("builtin", 48, 256, "ee" * 32),
        options={"search": True},
        libraries={"torch": "2.13.0"},
        seconds={"search": 1.5},
        created="2025-01-01T00:00:00+00:00",
        weights_bytes=1000,
        layers=({"name": "layer.0", "error": 0.25},),
    )


def fill(folder: Path) -> None:
    (folder / "config.json").write_text('{"model_type": "llama"}')
    (folder / "model.safetensors").write_bytes(bytes(range(256)) * 4)
    (folder / "sub").mkdir()
    (folder / "sub" / "extra.txt").write_text("more")


def make(target: Path, in_the_middle: Callable[[], object] = int, **changes: str) -> Checkpoint:
    with writing(target, force=True) as folder:
        fill(folder)
        in_the_middle()
        seal(folder, manifest(name=target.name, **changes))
    return open_checkpoint(target)


def leftovers(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# The manifest


def test_what_is_sealed_is_what_is_opened(tmp_path: Path) -> None:
    folder = tmp_path / "made"
    folder.mkdir()
    fill(folder)
    sealed = seal(folder, manifest())
    opened = open_checkpoint(folder)
    assert opened == Checkpoint(folder, sealed)
    assert opened.variant.name == "awq-gemm"
    assert sorted(opened.manifest.files) == ["config.json", "model.safetensors", "sub/extra.txt"]
    weights = (folder / "model.safetensors").read_bytes()
    assert opened.manifest.files["model.safetensors"].sha256 == hashlib.sha256(weights).hexdigest()
    assert opened.manifest.files["model.safetensors"].bytes == len(weights) == 1024


def test_the_content_hash_follows_the_files_and_not_the_manifest(tmp_path: Path) -> None:
    first, second = make(tmp_path / "one"), make(tmp_path / "two")
    assert first.manifest != second.manifest
    assert first.content_sha256 == second.content_sha256
    (second.path / "sub" / "extra.txt").write_text("less")
    seal(second.path, second.manifest)
    assert open_checkpoint(second.path).content_sha256 != first.content_sha256


def test_the_hash_of_hashes_is_over_sorted_names_and_hashes() -> None:
    expected = hashlib.sha256(b"a 1\nb 2\n").hexdigest()
    assert hash_of_hashes({"b": "2", "a": "1"}) == hash_of_hashes({"a": "1", "b": "2"}) == expected
    assert hash_of_hashes({"a": "2", "b": "1"}) != expected


def test_a_manifest_of_an_unknown_variant_cannot_be_built() -> None:
    with pytest.raises(ValueError, match="unknown variant 'exl2'"):
        manifest(variant="exl2")


def damaged(change: Callable[[dict[str, Any]], Any]) -> bytes:
    data = to_data(manifest())
    changed = change(data)
    return json.dumps(data if changed is None else changed).encode()


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b'{"name": "Tiny',
        b"\xff\xfe\x00",
        b"[]",
        b"null",
        damaged(lambda data: data.pop("variant") and None),
        damaged(lambda data: data.update(variant="exl2")),
        damaged(lambda data: data.update(schema_version=99)),
        damaged(lambda data: data.update(unknown=1)),
        damaged(lambda data: data.update(source="hub")),
        damaged(lambda data: data.update(source={"kind": "hub"})),
        damaged(lambda data: data.update(files=[1])),
        damaged(lambda data: data.update(files={"a": {"bytes": 1}})),
        damaged(lambda data: data.update(calibration=3)),
        damaged(lambda data: data.update(layers=None)),
    ],
)
def test_a_damaged_manifest_is_one_line_that_says_what_to_do(tmp_path: Path, content: bytes) -> None:
    checkpoint = make(tmp_path / "made")
    (checkpoint.path / MANIFEST_NAME).write_bytes(content)
    with pytest.raises(UserError, match=r"quantable\.json is damaged .*quantize --force") as raised:
        open_checkpoint(checkpoint.path)
    assert "\n" not in str(raised.value)


def test_a_folder_without_manifest_and_no_folder_are_told_apart(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no such folder: .*nowhere"):
        open_checkpoint(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"is no quantable checkpoint \(no quantable\.json\)"):
        open_checkpoint(tmp_path)


# Finding


def test_checkpoints_are_found_by_model_and_then_in_the_order_of_the_table(tmp_path: Path) -> None:
    make(tmp_path / "b-8bit", variant="bnb-8bit", base_model="B")
    make(tmp_path / "a-8bit", variant="bnb-8bit", base_model="A")
    make(tmp_path / "z-fp16", variant="fp16", base_model="A")
    (tmp_path / "notes.txt").write_text("not a checkpoint")
    (tmp_path / "empty").mkdir()
    assert [c.path.name for c in find_checkpoints(tmp_path)] == ["z-fp16", "a-8bit", "b-8bit"]


def test_what_a_killed_run_left_is_not_found(tmp_path: Path) -> None:
    made = make(tmp_path / "made")
    for suffix in (".partial", ".old"):
        shadow = tmp_path / f".made{suffix}"
        shadow.mkdir()
        (shadow / MANIFEST_NAME).write_bytes((made.path / MANIFEST_NAME).read_bytes())
    assert [c.path.name for c in find_checkpoints(tmp_path)] == ["made"]


def test_a_folder_without_checkpoints_says_how_to_make_some(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="make some with `quantize SOURCE --out"):
        find_checkpoints(tmp_path)
    with pytest.raises(UserError, match="no such folder"):
        find_checkpoints(tmp_path / "nowhere")


# Verifying


def test_an_untouched_checkpoint_verifies(tmp_path: Path) -> None:
    verify(make(tmp_path / "made"))


def _flip_a_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[500] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (_flip_a_bit, "does not match its SHA-256"),
        (lambda path: path.write_bytes(path.read_bytes()[:-1]), "has 1023 bytes instead of 1024"),
        (lambda path: path.unlink(), "is missing"),
    ],
)
def test_a_changed_file_is_named(tmp_path: Path, change: Callable[[Path], Any], problem: str) -> None:
    checkpoint = make(tmp_path / "made")
    change(checkpoint.path / "model.safetensors")
    with pytest.raises(UserError, match=rf"made/model\.safetensors {problem}: make the checkpoint again"):
        verify(checkpoint)


# Writing


def test_the_target_appears_only_when_all_is_written(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "made"
    with writing(target) as folder:
        assert folder.parent == target.parent, "a rename must not cross file systems"
        fill(folder)
        seal(folder, manifest())
        assert not target.exists()
    verify(open_checkpoint(target))
    assert leftovers(target.parent) == ["made"]


def test_an_existing_checkpoint_is_kept_without_force_and_replaced_with_it(tmp_path: Path) -> None:
    target = make(tmp_path / "made").path
    with pytest.raises(UserError, match="made exists: use --force"), writing(target):
        pytest.fail("the block must not run")
    with writing(target, force=True) as folder:
        assert leftovers(folder) == [MANIFEST_NAME]
        fill(folder)
        (folder / "config.json").write_text("{}")
        seal(folder, manifest())
    assert (target / "config.json").read_text() == "{}"
    assert leftovers(tmp_path) == ["made"]


@pytest.mark.parametrize("force", [False, True])
def test_a_folder_that_is_not_ours_is_never_touched(tmp_path: Path, force: bool) -> None:
    target = tmp_path / "thesis"
    target.mkdir()
    (target / "chapter1.txt").write_text("words")
    with (
        pytest.raises(UserError, match="is no quantable checkpoint: choose another --out"),
        writing(target, force=force),
    ):
        pytest.fail("the block must not run")
    assert (target / "chapter1.txt").read_text() == "words"


def raise_interrupt() -> NoReturn:
    raise KeyboardInterrupt


def raise_bug() -> NoReturn:
    raise ZeroDivisionError("a bug")


@pytest.mark.parametrize(("stop", "error"), [(raise_interrupt, KeyboardInterrupt), (raise_bug, ZeroDivisionError)])
@pytest.mark.parametrize("exists", [False, True])
def test_nothing_half_written_stays_and_what_was_there_stays(
    tmp_path: Path, stop: Callable[[], NoReturn], error: type[BaseException], exists: bool
) -> None:
    target = tmp_path / "made"
    before = make(target) if exists else None
    with pytest.raises(error):
        make(target, in_the_middle=stop)
    assert leftovers(tmp_path) == (["made"] if exists else [])
    if before is not None:
        assert open_checkpoint(target) == before
        verify(before)


def test_an_interrupt_between_the_two_renames_puts_the_old_one_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = make(tmp_path / "made")
    rename = Path.rename

    def interrupted(self: Path, target: Path) -> Path:
        if self.name.endswith(".partial"):
            raise KeyboardInterrupt
        return rename(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", interrupted)
        with pytest.raises(KeyboardInterrupt):
            make(tmp_path / "made", base_model="Other")
    assert open_checkpoint(before.path) == before
    verify(before)
    assert leftovers(tmp_path) == ["made"]


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_one_line_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    before = make(tmp_path / "made")

    def full(*arguments: Any, **options: Any) -> NoReturn:
        raise OSError(code, os.strerror(code))

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", full)
        with pytest.raises(UserError, match="the disk is full while writing") as raised:
            make(tmp_path / "made")
    assert "\n" not in str(raised.value)
    assert leftovers(tmp_path) == ["made"]
    verify(before)


def test_a_disk_that_fills_while_the_manifest_is_flushed_is_seen_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(descriptor: int) -> NoReturn:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match="the disk is full"):
        make(tmp_path / "made")
    assert leftovers(tmp_path) == []


def test_a_disk_without_room_for_a_folder_is_full_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path, parents: bool = False) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "mkdir", full)
    with pytest.raises(UserError, match="the disk is full while writing"), writing(tmp_path / "target"):
        pass


def test_a_disk_full_in_safetensors_is_recognised_by_its_words() -> None:
    from safetensors import SafetensorError

    text = "Error while serializing: I/O error: No space left on device (os error 28)"
    assert disk_is_full(SafetensorError(text))
    assert not disk_is_full(SafetensorError("Error while serializing: I/O error: Is a directory (os error 21)"))
    assert not disk_is_full(ValueError(text))
    assert disk_is_full(OSError(errno.ENOSPC, ""))
    assert not disk_is_full(OSError(errno.EACCES, ""))


def test_safetensors_words_its_system_errors_the_way_we_read_them(tmp_path: Path) -> None:
    import torch
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    with pytest.raises(SafetensorError, match=rf"\(os error {errno.ENOENT}\)"):
        save_file({"a": torch.zeros(1)}, tmp_path / "nowhere" / "a.safetensors")


@pytest.mark.parametrize("parent", ["file", "file/below"])
def test_an_output_folder_that_cannot_be_made_is_one_line(tmp_path: Path, parent: str) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match=r"cannot write .*: choose another --out"):
        make(tmp_path / parent / "made")
    assert (tmp_path / "file").read_text() == "in the way"


def test_an_error_of_the_block_that_is_not_about_the_target_keeps_its_traceback(tmp_path: Path) -> None:
    with pytest.raises(PermissionError), writing(tmp_path / "made"):
        raise PermissionError(errno.EACCES, "reading the source")
    assert leftovers(tmp_path) == []


def test_what_a_killed_run_left_is_cleared_by_the_next(tmp_path: Path) -> None:
    for stale in (tmp_path / ".made.partial", tmp_path / ".made.old"):
        (stale / "sub").mkdir(parents=True)
        for name in ("half.safetensors", "sub/half.txt", MANIFEST_NAME):
            (stale / name).write_text("half")
    assert sorted(make(tmp_path / "made").manifest.files) == ["config.json", "model.safetensors", "sub/extra.txt"]
    assert leftovers(tmp_path) == ["made"]


@pytest.mark.parametrize("name", [".made.partial", ".made.old"])
def test_a_folder_of_the_users_in_the_way_is_left_alone(tmp_path: Path, name: str) -> None:
    (tmp_path / name).mkdir()
    (tmp_path / name / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match=rf"{name} is in the way, and is not of an earlier run: move it away"):
        make(tmp_path / "made")
    assert (tmp_path / name / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize("name", ["made.partial", "made.old"])
def test_a_backup_beside_a_checkpoint_is_left_alone(tmp_path: Path, name: str) -> None:
    kept = make(tmp_path / name)
    make(tmp_path / "made")
    make(tmp_path / "made", base_model="Other")
    verify(kept)


def test_control_c_in_a_real_process_leaves_nothing(tmp_path: Path) -> None:
    program = textwrap.dedent(
        """
        import sys, time
        from pathlib import Path
        from quantize.checkpoint import writing
        with writing(Path(sys.argv[1])) as folder:
            (folder / "model.safetensors").write_bytes(bytes(1000))
            print("ready", flush=True)
            time.sleep(60)
        """
    )
    root = Path(__file__).resolve().parents[2]
    environment = {**os.environ, "PYTHONPATH": str(root)}
    with subprocess.Popen(
        [sys.executable, "-c", program, str(tmp_path / "made")],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env=environment,
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        assert leftovers(tmp_path) == [".made.partial"]
        started = time.monotonic()
        process.send_signal(signal.SIGINT)
        process.wait(timeout=30)
    assert process.returncode != 0
    assert time.monotonic() - started < 30
    assert leftovers(tmp_path) == []


def test_a_large_file_is_hashed_right(tmp_path: Path) -> None:
    data = os.urandom(3_000_000)
    (tmp_path / "file").write_bytes(data)
    assert sha256_of(tmp_path / "file") == hashlib.sha256(data).hexdigest()


@pytest.mark.parametrize("name", ["model-2.safetensors", "own.py", "README.py"])
def test_a_file_that_the_manifest_does_not_name_is_refused(name: str, tmp_path: Path) -> None:
    checkpoint = make(tmp_path / "made").path
    (checkpoint / ".cache").mkdir()
    assert open_checkpoint(checkpoint).path == checkpoint
    (checkpoint / name).write_text("x")
    with pytest.raises(UserError, match=f"{name} is no file of this checkpoint"):
        open_checkpoint(checkpoint)


@pytest.mark.parametrize("name", ["../x", "/etc/x", "a/../../x", "", "..", "a\x1b[2J"])
@pytest.mark.parametrize("field", ["base_model", "name", "files"])
def test_a_name_in_a_manifest_stays_inside(field: str, name: str, tmp_path: Path) -> None:
    checkpoint = make(tmp_path / "made").path
    path = checkpoint / MANIFEST_NAME
    data = json.loads(path.read_text())
    data[field] = data["files"] | {name: {"bytes": 0, "sha256": "0"}} if field == "files" else name
    path.write_text(json.dumps(data))
    with pytest.raises(UserError, match="is damaged"):
        open_checkpoint(checkpoint)
