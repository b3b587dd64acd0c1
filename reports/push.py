"""`quantable push`: a checkpoint and its card go to the hub as a pull request. Imports no torch."""

import argparse
import json
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from quantize.checkpoint import CARD_NAME, MANIFEST_NAME, Manifest, open_checkpoint, verify
from quantize.errors import UserError
from quantize.schema import to_data
from quantize.shell import guarded, say
from reports.card import BEGIN, HUB_ID, card, public_text

UNREACHABLE = ("TransportError", "ConnectError", "ConnectionError", "Timeout", "OSError")
"""Of the client libraries, by name because they moved between versions."""


def push(folder: Path, repository: str, *, private: bool | None = None, records: Path | None = None) -> str:
    """Open a pull request with every file of the checkpoint, in a repository that is made where there is none; its URL.

    The manifest goes without paths of this machine. The hub is that of HF_ENDPOINT.

    Raises UserError for a checkpoint that is not whole, is broken by its records or has no card, where there is no
    token or no hub, and for what the hub refuses.
    """
    if not HUB_ID.fullmatch(repository):
        raise UserError(f"{repository!r} is no name on the hub: write org/name")
    checkpoint = open_checkpoint(folder)
    verify(checkpoint)
    if broken := card(folder, records=records).broken:
        raise UserError(f"{folder} is broken, {broken}: make it again, or measure it again")
    readme = folder / CARD_NAME
    if not readme.is_file() or BEGIN not in readme.read_text(encoding="utf-8-sig"):
        raise UserError(f"{folder} has no card: quantable card {folder} --write")
    from huggingface_hub import CommitOperationAdd, HfApi, ModelCard, constants, get_token

    if constants.HF_HUB_OFFLINE:
        raise UserError("HF_HUB_OFFLINE is set: unset it to push")
    if get_token() is None:
        raise UserError("the hub wants a token: run `hf auth login`, or set HF_TOKEN")
    there = (path for path in sorted(folder.rglob("*")) if path.is_file())
    files = {path.relative_to(folder).as_posix(): path for path in there}
    kept = [name for name in files if name[0] != "." or name.startswith(".eval_results/")]
    public = (json.dumps(to_data(without_paths(checkpoint.manifest)), indent=1) + "\n").encode()
    added = [CommitOperationAdd(name, public if name == MANIFEST_NAME else str(files[name])) for name in kept]
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    try:
        ModelCard.load(readme).validate()
        HfApi().create_repo(repository, private=private, exist_ok=True)
        made = HfApi().create_commit(
            repository, added, commit_message=f"Add {checkpoint.manifest.name}", create_pr=True
        )
    except Exception as error:
        kinds, reason = {one.__name__ for one in type(error).__mro__}, " ".join(str(error).split())
        if not kinds & {"HfHubHTTPError", "ValueError", *UNREACHABLE}:
            raise
        raise UserError(f"{constants.ENDPOINT} did not take {repository} ({reason}): mend that, push again") from None
    return str(made.pr_url or made.commit_url)


def without_paths(manifest: Manifest) -> Manifest:
    """The manifest as others may see it: the maker's own folders and files have no name."""
    source, text = manifest.source, manifest.calibration
    return replace(
        manifest,
        source=replace(source, id=manifest.base_model) if source.kind == "folder" else source,
        calibration=text and replace(text, text=public_text(text.text)),
    )


def parser() -> argparse.ArgumentParser:
    """The command line of `quantable push`."""
    p = argparse.ArgumentParser(prog="quantable push", description="Offer a checkpoint to the hub as a pull request.")
    p.add_argument("checkpoint", type=Path, metavar="CHECKPOINT", help="its folder, with the card in it")
    p.add_argument("repository", metavar="ORG/NAME", help="on the hub; made where there is none")
    p.add_argument("--private", action="store_true", default=None, help="where it is made: only for its owners")
    p.add_argument("--records", type=Path, metavar="FILE", help="of `bench` (default: records.jsonl beside the folder)")
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; its exit code is as `guarded` says."""
    return guarded("quantable push", lambda: _run(parser().parse_args(argv)))


def _run(options: argparse.Namespace) -> None:
    how = {"private": options.private, "records": options.records}
    say(push(options.checkpoint, options.repository, **how))
