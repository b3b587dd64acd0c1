"""`quantable card`: a checkpoint's README.md for the hub, whose block between two markers is made from facts alone.

What people write outside of the markers and in the front matter stays. Imports no torch.
"""

import argparse
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from quantize.checkpoint import CARD_NAME, PLOT_NAME, Checkpoint, Manifest, open_checkpoint
from quantize.errors import UserError
from quantize.files import sha256_of, write_whole
from quantize.shell import Parser, command, say
from quantize.variant import Variant
from reports.api import Reading
from reports.engines import EXPLAINED, cell, reasons
from reports.markdown import markdown
from reports.notes import broken_lines, setting_text, shape_text
from reports.pages import published_table, quality_table, speed_table
from reports.plots import plots
from reports.plots.style import file_bytes
from reports.results import Measurement, Result
from reports.table import Bullets, Heading, Link, Page, Paragraph, bulleted, titled

BEGIN, END = "<!-- quantable: `quantable card --write` renews what follows -->", "<!-- quantable: end -->"
HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*")
INHERITED = ("license", "license_name", "license_link", "language", "tags")  # said of all that is made of a source
EVALUATIONS_NAME = ".eval_results/quantable.yaml"

READERS = {  # which engines read a layout, or else a method's files
    "FP16": "transformers, vLLM and whatever else reads half-precision safetensors of this architecture",
    "GEMM": "transformers with gptqmodel, vLLM, and quantable itself (quantize.load)",
    "GEMV": "quantable itself (quantize.load); not vLLM and SGLang, which read the GEMM layout alone",
    "CT": "vLLM, SGLang, transformers with compressed-tensors, and quantable itself (quantize.load)",
    "GGUF": "llama.cpp and what is built on it, and quantable itself (quantize.load)",
    "BnB": "transformers with bitsandbytes, and quantable itself (quantize.load)",
}

SNIPPET = """\
With `pip install 'quantable[models]'`, beside the folder that it was downloaded to:

```python
import quantize

loaded = quantize.load({name!r})
prompt = loaded.tokenizer("The capital of France is", return_tensors="pt").input_ids.to(loaded.device)
tokens = loaded.model.generate(prompt, max_new_tokens=8, do_sample=False)
print(loaded.tokenizer.decode(tokens[0]))
```"""


@dataclass(frozen=True)
class Card:
    """A checkpoint's card.

    text:        of README.md.
    evaluations: of `.eval_results/quantable.yaml`, None where lm-eval asked no whole data set of the hub.
    plot:        loss against size, a PNG; None without figures or without matplotlib.
    broken:      why no sound checkpoint has its figures, None where they may be one's; advice: what is missing."""

    text: str
    evaluations: str | None
    plot: bytes | None
    broken: str | None
    advice: tuple[str, ...]

    def write(self, folder: Path) -> None:
        if self.plot is not None:
            write_whole(folder / PLOT_NAME, self.plot)
        write_whole(folder / CARD_NAME, self.text.encode())
        path = folder / EVALUATIONS_NAME
        path.unlink(missing_ok=True)
        if self.evaluations is not None:
            path.parent.mkdir(exist_ok=True)
            write_whole(path, self.evaluations.encode())


def card(
    folder: Path, *, records: Path | None = None, base_model: str | None = None, namespace: str | None = None
) -> Card:
    """The card of the checkpoint in this folder.

    records:    of `bench`, None for those beside the folder.
    base_model: on the hub, None for what the card says, or for the source where that is of the hub.
    namespace:  the user or organization on the hub to whose repositories the column Download leads."""
    checkpoint = open_checkpoint(folder)
    manifest, variant = checkpoint.manifest, checkpoint.variant
    source, sha256 = manifest.source, checkpoint.content_sha256
    if source.kind == "dummy":
        raise UserError(f"{folder} has random weights: make a card of a real model's checkpoint")
    if base_model and not HUB_ID.fullmatch(base_model):
        raise UserError(f"{base_model!r} is no name on the hub: write org/name")
    measured, engines, missing = _measured(checkpoint, records)
    readme = _readme(checkpoint)
    data = readme.data
    base = base_model or data.get("base_model") or (source.id if source.kind == "hub" else None)
    _complete(data, variant, base)
    try:
        figures = plots(measured[0])[0] if measured else {}
    except UserError:  # no matplotlib here
        figures = {}
    plot = file_bytes(figures["loss"], "png") if "loss" in figures else None
    block = [markdown(_figures(one, base, namespace)) for one in measured]
    if measured and (plot is not None or (folder / PLOT_NAME).is_file()):
        block.append(f"![Loss against size]({PLOT_NAME})")
    made = (Heading("How it was made"), Bullets(tuple(_facts(manifest))), Heading("How to load it"))
    readers = Paragraph(f"Read by {READERS[variant.version or variant.method.partition('.')[0]]}.")
    tried = tuple(f"{one.subject.engine}: {said}" for one in engines for said in (*reasons(one), cell(one))[:1])
    block += [markdown(made), SNIPPET.format(name=manifest.name), markdown((readers,))]
    said = (Paragraph("Perplexity in other engines, as measured:"), Bullets(tried), Paragraph(EXPLAINED))
    block += [markdown(said)] * bool(tried)
    readme.text = _renewed(readme.text, "\n\n".join(part.strip() for part in block))
    own = [row for one in measured for row in one.results if row.subject.content_sha256 == sha256]
    advice = [missing] if missing else []
    advice += [] if base else ["no base_model, since the source is not of the hub: give --base-model org/name"]
    advice += [] if data.get("license") else [f"no license: write `license:` into the front matter of {CARD_NAME}"]
    advice += [] if any(folder.glob("LICENSE*")) else ["no LICENSE: put that of the model into the folder"]
    broken = next((row.broken for row in own if row.broken), None)
    return Card(str(readme), _evaluations(own), plot, broken, tuple(advice))


def _complete(data: Any, variant: Variant, base_model: Any) -> None:
    """Put into the metadata what is known; what people chose there stays."""
    data["base_model"] = base_model
    relation = "quantized" if base_model and variant.w_bit else None
    ours = {"base_model_relation": relation, "library_name": "transformers", "pipeline_tag": "text-generation"}
    for key, value in ours.items():
        data[key] = data.get(key, value)
    kinds = ["awq" if variant.is_awq else "bitsandbytes", f"{variant.w_bit}-bit"] if variant.w_bit else []
    data["tags"] = list(dict.fromkeys([*(data.get("tags") or ()), "quantable", *kinds]))


def _measured(checkpoint: Checkpoint, records: Path | None) -> tuple[list[Measurement], list[Result], str | None]:
    """What was measured of this very content, each with the rows of its base model, and its rows in other engines."""
    source, measured, engines = records or checkpoint.path.resolve().parent, [], list[Result]()
    try:
        for one in Reading(source).measurements:
            own = [row for row in one.results if row.subject.content_sha256 == checkpoint.content_sha256]
            engines += [row for row in own if row.subject.engine]
            if ours := [row.subject for row in own if not row.subject.engine]:
                rows = (row for row in one.results if row.subject.baseline == ours[0].baseline)
                measured.append(replace(one, results=tuple(rows)))
    except UserError as error:
        return [], [], f"no figures: {error}"
    missing = None if measured else "no figures: the records are of other checkpoints, measure this one"
    return measured, engines, missing


def _readme(checkpoint: Checkpoint) -> Any:
    """The README.md that is there, as huggingface_hub reads it; of the source's, which was copied, only INHERITED."""
    from huggingface_hub import ModelCard
    from huggingface_hub.repocard import REGEX_YAML_BLOCK

    path, source = checkpoint.path / CARD_NAME, checkpoint.manifest.files.get(CARD_NAME)
    try:
        text = path.read_text(encoding="utf-8-sig") if path.is_file() else ""
        found = ModelCard(text if REGEX_YAML_BLOCK.search(text) else f"---\n\n---\n{text}")
    except Exception as error:  # of yaml and of huggingface_hub, whichever reads it
        raise UserError(f"{path} cannot be read ({' '.join(str(error).split())}): mend its front matter") from None
    if text and not (source and source.sha256 == sha256_of(path)):
        return found
    fresh = ModelCard(f"---\n\n---\n\n# {checkpoint.manifest.name}\n")
    for key in INHERITED:  # Python reads YAML 1.1, in which Norwegian is a refusal
        value = found.data.get(key)
        fresh.data[key] = ["no" if one is False else one for one in value] if isinstance(value, list) else value
    return fresh


def _renewed(text: str, block: str) -> str:
    """The text with this block in the place of the one between the markers, or at its end."""
    if BEGIN not in text and END not in text:
        text = f"{text.rstrip()}\n\n{BEGIN}{END}\n"
    before, _, rest = text.partition(BEGIN)
    _, closed, after = rest.partition(END)
    if not closed or BEGIN in rest or END in before + after:
        raise UserError(f"{CARD_NAME} does not hold {BEGIN} and {END} once each: take the block out")
    return f"{before}{BEGIN}\n\n{block}\n\n{END}{after}"


def _evaluations(own: Sequence[Result]) -> str | None:
    """The scores of tasks that asked all of a hub data set, as the hub's evaluation results."""
    from huggingface_hub import EvalResultEntry, eval_result_entries_to_yaml
    from huggingface_hub.utils import yaml_dump

    entries = []
    for one in next((row.tasks for row in own if row.tasks and not row.broken), ()):
        words = f"{one.metric} of {one.samples} questions, {one.shots}-shot, task {one.name} of lm-eval"
        if one.dataset:
            entries.append(EvalResultEntry(one.dataset, one.configuration or "default", one.value, notes=words))
    return str(yaml_dump(eval_result_entries_to_yaml(entries), sort_keys=False)) if entries else None


def _figures(measurement: Measurement, base: Any, namespace: str | None) -> Page:
    """The published columns, machine and date in one line, loss and decode."""

    def download(row: Result) -> str:
        own = f"{namespace}/{row.subject.folder}" if namespace else row.subject.download or ""
        place = base if row.is_reference and isinstance(base, str) else own
        link = Link(row.subject.download or row.subject.name)
        link.url = f"https://huggingface.co/{place}"
        return link if HUB_ID.fullmatch(place) else str(link)

    yield from bulleted(broken_lines(measurement))
    table = published_table(measurement)
    rows = zip(table.rows, measurement.results, strict=True)
    yield replace(table, rows=tuple((*cells[:-1], download(row)) for cells, row in rows))
    line = f"Measured on {setting_text(measurement)}. Times are relative to FP16/BF16: x2.00 takes twice as long."
    yield Paragraph(line)
    yield from titled("Loss on held-out text; KLD is in nats a token:", quality_table(measurement))
    for scenario in [one for one in measurement.scenarios if one.decode_steps][:1]:
        yield from titled(f"Decode, with {shape_text(scenario)}:", speed_table(measurement, scenario))


def _facts(manifest: Manifest) -> Iterator[str]:
    """Where the bytes came from, and what decided them; no path of the machine."""
    source, text, rounding = manifest.source, manifest.calibration, manifest.options.get("rounding")
    revision = f" at revision {source.revision}" if source.revision else ""
    named = "a local folder" if source.kind == "folder" else source.id
    if source.merge:
        how, made = source.merge["recipe"]["merge_method"], source.merge
        named = f"a {how} merge of {' and '.join(made['sources'])} (mergekit {made['mergekit']}, seed {made['seed']})"
    yield f"From {named}{revision}, weights with SHA-256 {source.weights_sha256}."
    if text is not None:
        label = public_text(text.text)
        yield f"Calibration text: {label}, {text.blocks} blocks of {text.block_tokens} tokens, SHA-256 {text.sha256}."
    if manifest.quantized_share is not None:
        chosen = f", codes by rounding {rounding}" if rounding else ""
        group = f", in groups of {manifest.q_group_size}" if manifest.q_group_size else ""
        yield f"{manifest.quantized_share:.1%} of the decoder's matrices quantized{group}{chosen}."
    versions = ", ".join(f"{name} {version}" for name, version in sorted(manifest.libraries.items()))
    yield f"{manifest.weights_bytes / 1e9:.3f} GB of weights, made on {manifest.created[:10]} with {versions}."


def public_text(text: str) -> str:
    """How others may know a calibration text: the maker's own files have no name."""
    return text if text == "builtin" or text.startswith("hub:") else "a text of the maker's own"


def parser() -> Parser:
    p = Parser(prog="quantable card", description="Make the model card of a checkpoint.")
    p.add_argument("checkpoint", type=Path, metavar="CHECKPOINT", help="its folder")
    p.add_argument("--write", action="store_true", help=f"into the folder's {CARD_NAME}, not on the screen")
    p.add_argument("--records", type=Path, metavar="FILE", help="of `bench` (default: those beside the folder)")
    p.add_argument("--base-model", metavar="ORG/NAME", help="on the hub (default: the source, where it is of the hub)")
    p.add_argument("--namespace", metavar="ORG", help="where on the hub the checkpoints are: Download becomes a link")
    return p


def run(options: argparse.Namespace) -> int:
    """Make the card; 1 for a checkpoint that its records show broken."""
    made = card(options.checkpoint, records=options.records, base_model=options.base_model, namespace=options.namespace)
    if options.write:
        made.write(options.checkpoint)
        say(f"wrote {options.checkpoint / CARD_NAME}")
    else:
        say(*made.text.splitlines())
    say(*made.advice, *([f"it is broken: {made.broken}"] if made.broken else []), to=sys.stderr)
    return int(made.broken is not None)


main = command(parser, run)
