"""The forecast of a run as a page: bars by stage and source, without scripts."""

import html
from pathlib import Path

from megachameleon.data.blending.blending import BlendedSamples
from megachameleon.data.blending.forecast import StageForecast
from megachameleon.files import write_text

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; color: #222 }
h1 { font-size: 1.4rem } h2 { font-size: 1.1rem; margin-top: 2rem } small { color: #666 }
table { border-collapse: collapse; width: 100% } th, td { padding: .25rem .6rem .25rem 0; text-align: right }
th { font-weight: 600; border-bottom: 1px solid #ccc } th:first-child, td:first-child { text-align: left }
.bar { display: flex; height: 1rem; width: 16rem; background: #eee } .bar div { height: 100% }
.text { background: #4477aa } .image { background: #ee8866 } svg { background: #f6f6f6; width: 100%; height: 6rem }
"""


def write_forecast_page(samples: BlendedSamples, stages: list[StageForecast], path: Path, title: str) -> None:
    """Write a self-contained page."""
    held = [
        [
            html.escape(name),
            *(f"{count:,}" for count in (d.summary.shards, d.summary.documents, d.summary.images, len(d))),
            *(f"{d.fill_rate:.1%}", f"{float(d.image_share):.1%}", d.summary.mode),
        ]
        for name, d in samples.datasets.items()
    ]
    headings = ["dataset", "shards", "documents", "pictures", "samples", "filled", "picture tokens", "packing"]
    parts = [f"<h1>What {html.escape(title)} will see</h1>", "<h2>Datasets</h2>", _table(headings, held)]
    for number, stage in enumerate(stages):
        parts += [f"<h2>Stage {number}: samples {stage.first:,} to {stage.end - 1:,}</h2>", _stage(stage)]
    page = f"<!doctype html><meta charset=utf-8><title>{html.escape(title)}</title><style>{STYLE}</style>"
    write_text(path, page + "\n".join(parts) + "\n")


def _stage(stage: StageForecast) -> str:
    largest = max((source.tokens for source in stage.sources), default=1)
    rows = []
    for source in stage.sources:
        text, image = ((source.tokens - source.image_tokens) / largest, source.image_tokens / largest)
        bar = f'<div class=text style="width:{text:.2%}"></div><div class=image style="width:{image:.2%}"></div>'
        rows.append(
            [
                *(html.escape(source.dataset), f"<div class=bar>{bar}</div>", f"{source.tokens / stage.tokens:.2%}"),
                *(f"{count:,.0f}" for count in (source.tokens - source.image_tokens, source.image_tokens)),
                *(f"{source.pictures:,.0f}", f"{source.samples:,}", f"{source.epochs:.2f}"),
                *(f"{source.repeated:,}", f"{source.most_reads}"),
            ]
        )
    headings = ["source", "tokens with loss: text, pictures", "share", "text", "picture tokens", "pictures", "samples"]
    return _table([*headings, "epochs by its end", "repeated", "most reads"], rows) + _windows(stage)


def _windows(stage: StageForecast) -> str:
    text = f"<p>{stage.image_share:.2%} of {stage.tokens:,.0f} tokens are of pictures"
    if not stage.windows:
        return text + ".</p>"
    low, high = min(stage.windows), max(stage.windows)
    step = 100 / len(stage.windows)
    bars = "".join(
        f'<rect class=image fill="#ee8866" x="{n * step:.2f}" y="{100 - 100 * share:.2f}" width="{0.8 * step:.2f}" '
        f'height="{100 * share:.2f}"/>'
        for n, share in enumerate(stage.windows)
    )
    chart = f'<svg viewBox="0 0 100 100" preserveAspectRatio="none">{bars}</svg>'
    return f"{text}; {low:.2%} to {high:.2%} in {len(stage.windows)} global batches:</p>{chart}"


def _table(headings: list[str], rows: list[list[str]]) -> str:
    head = "".join(f"<th>{heading}</th>" for heading in headings)
    body = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<table><tr>{head}</tr>{body}</table>"
