"""`quantable push`: a checkpoint and its card go to the hub as a pull request. Imports no torch."""

import json
from dataclasses import replace
from pathlib import Path

from quantize.checkpoint import CARD_NAME, MANIFEST_NAME, open_checkpoint, verify
from quantize.errors import UserError
from quantize.schema import to_data
from quantize.shell import Parser, command, say
from reports.card import BEGIN, HUB_ID, card, public_text


def push(folder: Path, repository: str, *, private: bool | None = None) -> str:
    """Open a pull request with every file of the checkpoint, in a repository that is made where there is none; its URL.

    The manifest goes without paths of this machine. The hub is that of HF_ENDPOINT. Raises UserError for a checkpoint
    that is not whole, has no card or is broken by the records beside it, without a token, and for what the hub refuses.
    """
    checkpoint, readme = open_checkpoint(folder), folder / CARD_NAME
    verify(checkpoint)
    if broken := card(folder).broken:
        raise UserError(f"{folder} is broken, {broken}: make it again, or measure it again")
    if not readme.is_file() or BEGIN not in readme.read_text(encoding="utf-8-sig"):
        raise UserError(f"{folder} has no card: quantable card {folder} --write")
    if not HUB_ID.fullmatch(repository):
        raise UserError(f"{repository!r} is no name on the hub: write org/name")
    from huggingface_hub import CommitOperationAdd, HfApi, ModelCard, constants, get_token
    from huggingface_hub.utils import disable_progress_bars

    if constants.HF_HUB_OFFLINE:
        raise UserError("HF_HUB_OFFLINE is set: unset it to push")
    if get_token() is None:
        raise UserError("the hub wants a token: run `hf auth login`, or set HF_TOKEN")
    paths = {path.relative_to(folder).as_posix(): str(path) for path in sorted(folder.rglob("*")) if path.is_file()}
    files = {name: path for name, path in paths.items() if name[0] != "." or name.startswith(".eval_results/")}
    manifest, text = checkpoint.manifest, checkpoint.manifest.calibration  # of the maker's own files no name is told
    source, local = manifest.source, manifest.source.kind in ("folder", "merge")
    source = replace(source, id=manifest.base_model) if local else source
    shown = replace(manifest, source=source, calibration=text and replace(text, text=public_text(text.text)))
    added = [CommitOperationAdd(name, path) for name, path in files.items() if name != MANIFEST_NAME]
    added.append(CommitOperationAdd(MANIFEST_NAME, (json.dumps(to_data(shown), indent=1) + "\n").encode()))
    disable_progress_bars()
    try:
        ModelCard.load(readme).validate()
        HfApi().create_repo(repository, private=private, exist_ok=True)
        made = HfApi().create_commit(repository, added, commit_message=f"Add {folder.resolve().name}", create_pr=True)
    except Exception as error:  # of the hub, or of whichever library asks it
        reason = " ".join(str(error).split())
        raise UserError(f"{constants.ENDPOINT} did not take {repository} ({reason}): mend that, push again") from None
    return str(made.pr_url or made.commit_url)


def parser() -> Parser:
    p = Parser(prog="quantable push", description="Offer a checkpoint to the hub as a pull request.")
    p.add_argument("checkpoint", type=Path, metavar="CHECKPOINT", help="its folder, with the card in it")
    p.add_argument("repository", metavar="ORG/NAME", help="on the hub; made where there is none")
    p.add_argument("--private", action="store_true", default=None, help="where it is made: only for its owners")
    return p


main = command(parser, lambda given: say(push(given.checkpoint, given.repository, private=given.private)))
