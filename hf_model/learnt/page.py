"""The page that shows what a checkpoint has learnt: one HTML file without scripts, drawn by page.html.jinja."""

import math
import os
import shlex
import sys
from collections.abc import Sequence
from datetime import date
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from transformers import PreTrainedTokenizerFast

import hf_model
from hf_model.errors import UserError, memory_for
from hf_model.learnt.content import Content, Head, gather
from hf_model.learnt.diagnosis import STUTTER_MASS, STUTTER_RUN
from hf_model.learnt.inspection import Inspection
from hf_model.learnt.training_data import Measurement
from hf_model.modeling_custom_gpt import CustomGPTForCausalLM
from hf_model.writing import disk_errors, write_file

MARK = "<!doctype html><!-- what a checkpoint has learnt -->"  # only files that begin with it are replaced
VISIBLE = {"\n": "⏎", "\t": "⇥", "\r": "␍", "\0": "␀"}
FIRST_SHOWN = 240  # characters of a record
FLAT_LINE = 0.05  # nats; a loss below it at every position is not drawn
# For each verdict, its tone and the first words of the page.
HEADLINES = {
    "broken": ("bad", "It cannot work: NaN or infinite weights"),
    "no numbers": ("bad", "Its predictions are NaN or infinite"),
    "stutters": ("bad", "It stutters"),
    "untrained": ("warn", "It is untrained"),
    "misfit": ("warn", "It does not fit its training data"),
    "weights": ("warn", "Some of its weights stand out"),
    "unknown": ("warn", "Unknown"),
    "healthy": ("good", "Healthy"),
}
HEADS_OF_A_HABIT = 4  # drawn; the others are folded where there are more than HEADS_UNFOLDED in all
HEADS_UNFOLDED = 12


def check_page(path: Path) -> None:
    """Refuse a place where no page can be written, and a link or a file there that is not a page of ours.

    Raises:
        UserError: the place cannot be written, or holds such a link or file.
    """
    if not os.access(path.parent, os.W_OK | os.X_OK):
        raise UserError(f"{path}: cannot be written (there is no folder {path.parent}, or none of yours)")
    with disk_errors(path):
        if path.is_symlink():
            raise UserError(f"{path}: is a symbolic link; name the file itself")
        if path.exists() and not (path.is_file() and _is_page(path)):
            raise UserError(f"{path}: exists already and is no report; choose another name for --report")


def _is_page(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(len(MARK)) == MARK.encode()


@memory_for("to draw the report")
def write_page(
    inspection: Inspection, model: CustomGPTForCausalLM, tokenizer: PreTrainedTokenizerFast, path: Path
) -> None:
    """Write the page. It appears as a whole, and never through a link.

    Raises:
        UserError: as `check_page`.
    """
    check_page(path)
    page = render(gather(inspection, model, tokenizer))
    check_page(path)  # drawing took a while
    with disk_errors(path):
        write_file(path, page.encode("utf-8", "replace"), overwrite=True)


def render(content: Content) -> str:
    """The page's HTML."""
    # The library escapes every text, after `finalize` has made its invisible characters visible.
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        finalize=visible,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"percent": percent, "number": number, "share": share, "shade": shade, "squares": squares}
    inspection = content.inspection
    key, text = judge(content)
    distinctive, folded = distinguish(content.attention)
    return environment.get_template("page.html.jinja").render(
        mark=MARK,
        content=content,
        inspection=inspection,
        diagnosis=inspection.diagnosis,
        measured=inspection.measurement,
        key=key,
        text=text,
        tone=HEADLINES[key][0],
        headline=HEADLINES[key][1],
        stutter_mass=STUTTER_MASS,
        stutter_run=STUTTER_RUN,
        line=loss_line(inspection.measurement) if inspection.measurement else None,
        faults=[weight for weight in content.weights if weight.fault],
        kinds=list(dict.fromkeys(weight.kind for weight in content.weights if weight.layer >= 0)),
        layers=sorted({weight.layer for weight in content.weights if weight.layer >= 0}),
        cells={(weight.kind, weight.layer): weight for weight in content.weights},
        distinctive=distinctive,
        folded=folded,
        first_shown=FIRST_SHOWN,
        today=date.today().isoformat(),
        version=hf_model.__version__,
        command=shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
    )


def visible(value: object) -> object:
    """A value as text in which every character can be seen, and none turns the direction of writing."""
    if hasattr(value, "__html__"):  # a part of the template, rendered already
        return value
    return "".join(VISIBLE.get(char, char if char.isprintable() else ascii(char)[1:-1]) for char in str(value))


def percent(value: float) -> str:
    return f"{value:.0%}" if value >= 0.995 else f"{value:.1%}" if value >= 0.001 else "<0.1%"


def number(value: float) -> str:
    return f"{value:.3g}" if math.isfinite(value) else "NaN"


def share(value: float, most: float) -> str:
    """How far a value is on the way from 0 to `most`, as a length in CSS."""
    return f"{100 * min(max(value / most, 0.0), 1.0) if most > 0 else 0:.1f}%"


def shade(ratio: float) -> str:
    """The opacity of a weight's cell; each doubling adds as much."""
    return f"{min(max(0.2 + 0.2 * math.log2(max(ratio, 1e-3)), 0.03), 0.55):.2f}"


def squares(weights: Sequence[Sequence[float]]) -> str:
    """An attention map as one SVG path: a square for each weight, whose area is the weight."""
    path = []
    for y, row in enumerate(weights):
        for x, weight in enumerate(row[: y + 1]):
            side = math.sqrt(weight)
            if side > 0.08:
                at = (1 - side) / 2
                path.append(f"M{x + at:.2f} {y + at:.2f}h{side:.2f}v{side:.2f}h-{side:.2f}z")
    return "".join(path)


def judge(content: Content) -> tuple[str, str]:
    """The worst that is known of the model: a key of HEADLINES, and the text below the headline."""
    inspection, measured = content.inspection, content.inspection.measurement
    if inspection.diagnosis is None:
        return "broken", f"there are NaN or infinite values in {', '.join(inspection.non_finite[:5])}"
    verdict, details = inspection.diagnosis.verdict, inspection.diagnosis.details()
    if inspection.diagnosis.is_harm:
        return verdict, details
    if measured and measured.repeats:
        return "stutters", "its training data fits far better with labels that are not shifted by one"
    if measured and (measured.better or measured.fits_badly):
        warnings = [finding.text for finding in measured.findings() if finding.about == "warning"]
        return "misfit", ". ".join(warnings)
    return "weights" if any(weight.fault for weight in content.weights) else verdict, details


def loss_line(measured: Measurement) -> tuple[str, float, float] | None:
    """The points of the loss by position in a square of 100 by 100, the loss at its top, an even choice's height.

    None where there is nothing to be seen: a single position, or hardly any loss.
    """
    points = measured.by_position
    highest = max(loss for _, loss in points)
    if len(points) < 2 or not FLAT_LINE <= highest < math.inf:
        return None
    first, last, top = points[0][0], points[-1][0], 1.1 * highest
    at = [(100 * (start - first) / (last - first), 100 - 100 * loss / top) for start, loss in points]
    return " ".join(f"{x:.1f},{y:.1f}" for x, y in at), top, 100 - 100 * measured.even_choice / top


def distinguish(heads: Sequence[Head]) -> tuple[list[Head], list[Head]]:
    """The heads to draw at once, and those to fold: of many heads, the clearest ones of each habit stand out."""
    if len(heads) <= HEADS_UNFOLDED:
        return list(heads), []
    chosen: set[int] = set()
    for habit in {head.habit for head in heads if head.share}:
        ranked = sorted((-head.share, i) for i, head in enumerate(heads) if head.habit == habit)
        chosen.update(i for _, i in ranked[:HEADS_OF_A_HABIT])
    return [heads[i] for i in sorted(chosen)], [head for i, head in enumerate(heads) if i not in chosen]
