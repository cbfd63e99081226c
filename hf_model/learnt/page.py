"""What was gathered, as one HTML page without scripts. Every text that comes from a file or a model is escaped."""

import html
import math
from collections.abc import Iterable, Sequence

from hf_model.learnt.content import Answer, Candidate, Content, Embeddings, Head, Token, Weight
from hf_model.learnt.diagnosis import STUTTER_MASS, STUTTER_RUN, Diagnosis
from hf_model.learnt.inspection import Inspection
from hf_model.learnt.style import STYLE
from hf_model.learnt.training_data import CLEARLY, Alternative, Measurement

MARK = "<!doctype html><!-- what a checkpoint has learnt -->"
"""The beginning of every page of ours: no other file is replaced."""
VISIBLE = {"\n": "⏎", "\t": "⇥", "\r": "␍", "\0": "␀"}
FIRST_SHOWN = 240  # characters of a record

PAGE = """{mark}
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<title>{title}</title><style>{style}</style></head>
<body><main>
{body}
<footer>Made by convert_checkpoint.py --report. This page loads nothing and holds no script.</footer>
</main></body></html>
"""


def render(content: Content) -> str:
    """The page's HTML."""
    inspection = content.inspection
    parts = [
        verdict(content),
        file_section(inspection),
        answers_section(content.answers) if content.answers else "",
        data_section(inspection.measurement) if inspection.measurement else "",
        weights_section(content.weights),
        embeddings_section(content.embeddings) if content.embeddings else "",
        attention_section(content.attention_tokens, content.attention) if content.attention else "",
    ]
    title = f"{inspection.path} · what it has learnt"
    return PAGE.format(mark=MARK, title=escaped(title), style=STYLE, body="\n".join(filter(None, parts)))


def escaped(text: object) -> str:
    """Any text, safe in HTML and with every character to be seen; directions of writing do not leak out of it."""
    return html.escape("".join(VISIBLE.get(c, c if c.isprintable() else ascii(c)[1:-1]) for c in str(text)))


def section(title: str, *parts: str, note: str = "") -> str:
    note_line = f'<p class="soft">{note}</p>' if note else ""
    return f"<section><h2>{title}</h2>{note_line}{''.join(parts)}</section>"


def verdict(content: Content) -> str:
    """What it comes to, large, with the numbers that led to it."""
    inspection = content.inspection
    diagnosis, measurement = inspection.diagnosis, inspection.measurement
    faults = [weight for weight in content.weights if weight.fault]
    tone, word = "good", "Nothing wrong to be seen"
    text = diagnosis.line().removeprefix("nothing to say: ") if diagnosis else ""
    if diagnosis is None:
        tone, word = "bad", "It cannot work: NaN or infinite weights"
        text = f"Its weights are no numbers in {', '.join(inspection.non_finite[:5])}"
    elif diagnosis.verdict == "no numbers":
        tone, word = "bad", "Its predictions are no numbers"
    elif diagnosis.verdict == "stutters" or (measurement and measurement.repeats):
        tone, word = "bad", "It stutters"
    elif diagnosis.verdict == "untrained":
        tone, word = "warn", "It is untrained"
    elif measurement and (measurement.better or measurement.loss > measurement.even_choice):
        tone, word = "warn", "It does not fit its training data"
    elif faults:
        tone, word = "warn", "Some of its weights stand out"
    gauges = gauge_row(diagnosis, inspection) if diagnosis and diagnosis.probes else ""
    return (
        f'<section class="verdict {tone}"><h1>{escaped(inspection.path)}</h1><strong>{word}</strong>'
        f"<p>{escaped(text[:1].upper() + text[1:])}.</p>{gauges}</section>"
    )


def gauge_row(diagnosis: Diagnosis, inspection: Inspection) -> str:
    most = math.log(max(inspection.tokens - 1, 2))
    copy_mass, flatness, limit = diagnosis.copy_mass, diagnosis.flatness, diagnosis.flat_below
    gauges = [
        gauge(
            "Repeats what it has just read", copy_mass, 1, STUTTER_MASS, copy_mass >= STUTTER_MASS, f"{copy_mass:.0%}"
        )
    ]
    if diagnosis.run is not None:
        is_bad = diagnosis.run >= STUTTER_RUN
        gauges.append(gauge("Goes on repeating", diagnosis.run, 1, STUTTER_RUN, is_bad, f"{diagnosis.run:.0%}"))
    gauges.append(
        gauge("Knows what comes next", flatness, most, limit, flatness < limit, f"{flatness:.1f} of {most:.1f} nats")
    )
    return f'<div class="gauges">{"".join(gauges)}</div>'


def gauge(name: str, value: float, most: float, limit: float, is_bad: bool, shown: str) -> str:
    width, mark = (100 * min(max(part / most, 0), 1) for part in (value, limit))
    return (
        f'<div class="gauge"><div class="head"><span>{name}</span><span class="value">{shown}</span></div>'
        f'<div class="track"><div class="fill{" bad" if is_bad else ""}" style="width:{width:.1f}%"></div>'
        f'<div class="mark" style="left:{mark:.1f}%"></div></div></div>'
    )


def file_section(inspection: Inspection) -> str:
    origins: dict[str, list[str]] = {}
    for name, found in inspection.architecture.items():
        origins.setdefault(found.origin, []).append(f"{name} {found.value}")
    rows = [
        ("Source", inspection.source),
        ("Architecture", inspection.architecture_line),
        *((f"by {origin}", ", ".join(values)) for origin, values in origins.items()),
        ("Parameters", inspection.parameters_line),
        ("Tokenizer", inspection.tokenizer_line),
        ("Optimizer", "its state is in the file" if inspection.has_optimizer else "no state of it"),
        *(("Note", note.removeprefix("note: ")) for note in inspection.notes),
    ]
    items = "".join(f"<dt>{escaped(name)}</dt><dd>{escaped(value)}</dd>" for name, value in rows)
    return section("What the file is", f"<dl>{items}</dl>")


def answers_section(answers: Sequence[Answer]) -> str:
    legend = (
        '<div class="legend"><span><span class="t" style="--p:1">sure</span> '
        '<span class="t" style="--p:.5">half</span> <span class="t" style="--p:.05">a guess</span></span>'
        '<span><span class="t copy" style="--p:.8">again</span> the token before, once more</span>'
        "<span>point at a token, or touch it, for what else was likely</span></div>"
    )
    return section(
        "What it answers",
        legend,
        *(answer(one) for one in answers),
        note="The likeliest token at every step, after a few prompts of its own format.",
    )


def answer(one: Answer) -> str:
    tokens = "".join(map(token, one.tokens))
    table = candidates(one.candidates) if one.candidates else ""
    return f'<div class="prompt"><bdi>{escaped(one.prompt)}</bdi></div><div class="answer">{tokens}</div>{table}'


def token(one: Token) -> str:
    likely = [(one.text, one.probability), *one.alternatives]
    tip = "".join(f"<span><bdi>{escaped(text)}</bdi><b>{percent(p)}</b></span>" for text, p in likely)
    kind = "t copy" if one.is_copy else "t"
    return (
        f'<span class="{kind}" tabindex="0" style="--p:{one.probability:.3f}"><bdi>{escaped(one.text)}</bdi>'
        f'<span class="tip">{tip}</span></span>'
    )


def candidates(some: Iterable[Candidate]) -> str:
    rows = "".join(
        f'<tr><td><code>{escaped(one.text)}</code></td><td class="n">{percent(one.weight)}</td>'
        f'<td class="n">{percent(one.repeat)}</td></tr>'
        for one in some
    )
    return (
        "<details><summary>The tokens that this answer could begin with, and whether they come again</summary>"
        '<table><tr><th>token</th><th class="n">begins the answer</th><th class="n">comes again once read</th></tr>'
        f"{rows}</table></details>"
    )


def percent(share: float) -> str:
    return f"{share:.0%}" if share >= 0.995 else f"{share:.1%}" if share >= 0.001 else "<0.1%".replace("<", "&lt;")


def weights_section(weights: Sequence[Weight]) -> str:
    kinds = list(dict.fromkeys(weight.kind for weight in weights if weight.layer >= 0))
    layers = sorted({weight.layer for weight in weights if weight.layer >= 0})
    at = {(weight.kind, weight.layer): weight for weight in weights}
    head = "".join(f"<th>{escaped(kind)}</th>" for kind in kinds)
    rows = "".join(
        f"<tr><th>layer {layer}</th>{''.join(cell(at.get((kind, layer))) for kind in kinds)}</tr>" for layer in layers
    )
    outside = "".join(
        f'<tr><th>{escaped(weight.kind)}</th><td class="n{" fault" if weight.fault else ""}">{number(weight.rms)}</td>'
        f'<td class="n">{number(weight.largest)}</td></tr>'
        for weight in weights
        if weight.layer < 0
    )
    faults = "".join(
        f"<li>{escaped(weight.kind)}{f' of layer {weight.layer}' if weight.layer >= 0 else ''}: {weight.fault}</li>"
        for weight in weights
        if weight.fault
    )
    return section(
        "Its weights",
        f'<ul class="fault-list">{faults}</ul>'
        if faults
        else "<p>No layer stands out: none is dead, none has exploded.</p>",
        f'<div class="scroll"><table class="heat"><tr><th></th>{head}</tr>{rows}</table></div>',
        '<details><summary>The weights outside of the layers</summary><table><tr><th></th><th class="n">'
        f'root mean square</th><th class="n">largest</th></tr>{outside}</table></details>',
        note="The root mean square of each matrix and gain; the more colour, the larger among its column.",
    )


def cell(weight: Weight | None) -> str:
    if weight is None:
        return "<td></td>"
    if weight.fault:
        return f'<td class="fault" title="{escaped(weight.fault)}">{number(weight.rms)}</td>'
    shade = min(max(0.25 + 0.25 * math.log2(max(weight.ratio, 1e-3)), 0.03), 0.75)
    return f'<td style="--p:{shade:.2f}" title="largest {number(weight.largest)}">{number(weight.rms)}</td>'


def number(value: float) -> str:
    return f"{value:.3g}" if math.isfinite(value) else "NaN"


def embeddings_section(found: Embeddings) -> str:
    most = max(found.counts)
    width = 600 / len(found.counts)
    bars = "".join(
        f'<rect class="bar" x="{i * width:.1f}" y="{140 - 130 * count / most:.1f}" width="{width - 1:.1f}" '
        f'height="{130 * count / most:.1f}"><title>{count} tokens</title></rect>'
        for i, count in enumerate(found.counts)
    )
    ends = [
        f'<p class="soft">{name}: {", ".join(f"<code>{escaped(text)}</code> {norm:.2f}" for text, norm in some)}</p>'
        for name, some in (("shortest", found.smallest), ("longest", found.largest))
    ]
    return section(
        "Its token embeddings",
        f'<svg class="chart" viewBox="0 0 600 165" role="img" aria-label="histogram of embedding norms">{bars}'
        f'<text x="0" y="160">{found.low:.2f}</text>'
        f'<text x="600" y="160" text-anchor="end">{found.high:.2f}</text></svg>',
        *ends,
        note="How long each token's vector is. A token that training never saw stays near where it began.",
    )


def attention_section(tokens: Sequence[str], heads: Sequence[Head]) -> str:
    figures = "".join(
        f"<figure>{attention_map(head.weights)}<figcaption>layer {head.layer}, head {head.head}<br>{head.habit}"
        "</figcaption></figure>"
        for head in heads
    )
    read = " ".join(f"<code>{escaped(text)}</code>" for text in tokens)
    return section(
        "Where it looks",
        f"<p>{read}</p>",
        f'<div class="maps">{figures}</div>',
        note="The attention of each head over this prompt: a row for each token that is read, a column for each that "
        "it looks at, the first token at the top left.",
    )


def attention_map(weights: Sequence[Sequence[float]]) -> str:
    """Squares whose side grows with the weight, drawn as one path: legible on any ground, and small in the file."""
    squares = []
    for y, row in enumerate(weights):
        for x, weight in enumerate(row[: y + 1]):
            side = math.sqrt(weight)
            if side > 0.08:
                at = (1 - side) / 2
                squares.append(f"M{x + at:.2f} {y + at:.2f}h{side:.2f}v{side:.2f}h-{side:.2f}z")
    n = len(weights)
    return f'<svg viewBox="0 0 {n} {n}" role="img" aria-label="attention map"><path d="{"".join(squares)}"/></svg>'


def data_section(measured: Measurement) -> str:
    lines = "".join(
        f"<p>{escaped(line.removeprefix('training data ').strip())}</p>"
        if not line.startswith("warning: ")
        else f'<p class="fault-list"><strong>{escaped(line.removeprefix("warning: "))}</strong></p>'
        for line in measured.lines()
    )
    worst = "".join(
        f'<tr><td class="n">{record.loss:.2f}</td><td>{escaped(record.prompt[:FIRST_SHOWN])}</td>'
        f"<td>{escaped(record.answer[:FIRST_SHOWN])}</td></tr>"
        for record in measured.worst
    )
    others = "".join(
        f'<tr><td>{escaped(other.option)} {escaped(other.value)}</td><td class="n">{other.loss:.4f}</td>'
        f"<td>{fit(other)}</td></tr>"
        for other in measured.alternatives
    )
    return section(
        "Held against its training data",
        loss_bars(measured),
        lines,
        loss_chart(measured),
        f'<p class="soft">The {"stretches" if measured.is_text else "records"} that it knows worst</p>'
        '<div class="scroll"><table><tr><th class="n">loss</th>'
        f"<th>{'' if measured.is_text else 'prompt'}</th><th>{'text' if measured.is_text else 'answer'}</th></tr>"
        f"{worst}"
        "</table></div>",
        f"<details><summary>The loss with other options (as it is: {measured.chosen_loss:.4f})</summary>"
        f"<table>{others}</table></details>",
    )


def fit(other: Alternative) -> str:
    return "fits better" if other.ahead > CLEARLY else "worse" if other.ahead < -CLEARLY else "no different"


def loss_bars(measured: Measurement) -> str:
    if measured.loss_shifted is None or measured.loss_unshifted is None:
        return ""
    most = max(measured.loss_shifted, measured.loss_unshifted, measured.even_choice)
    return (
        '<div class="gauges">'
        + "".join(
            gauge(name, loss, most, measured.even_choice, is_bad, f"{loss:.2f} nats")
            for name, loss, is_bad in (
                ("Loss, labels shifted by one", measured.loss_shifted, measured.loss > measured.even_choice),
                ("Loss, labels not shifted", measured.loss_unshifted, measured.repeats),
            )
        )
        + '</div><p class="soft">The lower of the two is what it was trained on. The mark: an even choice among all '
        "tokens.</p>"
    )


def loss_chart(measured: Measurement) -> str:
    """The mean loss by position, as a line from the first position to the last."""
    points = measured.by_position
    if len(points) < 2:
        return ""
    most = max(max(loss for _, loss in points), 1e-6) * 1.1
    first, last = points[0][0], points[-1][0]
    at = [(40 + 550 * (start - first) / (last - first), 150 - 140 * loss / most) for start, loss in points]
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in at)
    even = 150 - 140 * measured.even_choice / most
    even_line = f'<line class="even" x1="40" x2="590" y1="{even:.1f}" y2="{even:.1f}"/>' if even > 0 else ""
    return (
        '<p class="soft">Loss by position in the context</p>'
        '<svg class="chart" viewBox="0 0 600 175" role="img" aria-label="loss by position">'
        '<line class="axis" x1="40" x2="590" y1="150" y2="150"/>'
        f'{even_line}<polyline class="line" points="{path}"/>'
        f'<text x="34" y="16" text-anchor="end">{most:.2g}</text><text x="34" y="154" text-anchor="end">0</text>'
        f'<text x="40" y="170">{first}</text><text x="590" y="170" text-anchor="end">{last}</text></svg>'
    )
