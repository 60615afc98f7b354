"""The two tables that show the results of the port."""

from collections.abc import Sequence

from rich.table import Table
from torch import nn

from .compare import ForwardResult, count_agreeing, max_difference
from .conversion import FlaxTwin
from .data import Images


def comparison_table(
    images: Images,
    net: nn.Module,
    reference: ForwardResult,
    twins: Sequence[FlaxTwin],
    results: Sequence[ForwardResult],
) -> Table:
    """A column for the torch network and each twin; ``results`` in the order of ``twins``."""
    table = _table("torch", *(f"Flax {twin.kind}" for twin in twins))
    labels, total = images.labels, len(images)
    parameters = sum(p.numel() for p in net.parameters())
    statistics = sum(b.numel() for b in net.buffers() if b.is_floating_point())
    table.add_row("parameters moved", f"{parameters:,}", *(f"{twin.parameters:,}" for twin in twins))
    if statistics:
        table.add_row("running statistics", f"{statistics:,}", *(f"{twin.statistics:,}" for twin in twins))
    table.add_row("conversion", "", *(_time(twin.seconds) for twin in twins))
    table.add_row("back in torch", "", *("same bits" if twin.round_trip else "CHANGED" for twin in twins))
    table.add_row("|difference of logits|", "", *(f"{max_difference(reference, o):.1e}" for o in results))
    table.add_row(
        "predictions that agree", "", *(f"{count_agreeing(reference, o):,}/{total:,}" for o in results)
    )
    table.add_row("accuracy", *(f"{o.accuracy(labels):.2%}" for o in (reference, *results)))
    table.add_row(f"forward, {total:,} images", *(_time(o.seconds) for o in (reference, *results)))
    return table


def finetuning_table(
    images: Images, losses: Sequence[float], before: ForwardResult, tuned: ForwardResult, back: ForwardResult
) -> Table:
    """The effect of fine-tuning, in Flax and back in torch; ``losses`` has one loss per step."""
    table = _table("before", "fine-tuned", "back in torch")
    labels, total = images.labels, len(images)
    window = min(10, len(losses))
    first, last = sum(losses[:window]) / window, sum(losses[-window:]) / window
    table.add_row("loss on all images", *(f"{o.loss(labels):.4f}" for o in (before, tuned, back)))
    table.add_row(f"first, last {window} steps' loss", f"{first:.4f}", f"{last:.4f}", "")
    table.add_row("accuracy", *(f"{o.accuracy(labels):.2%}" for o in (before, tuned, back)))
    table.add_row("max |difference of logits|", "", "", f"{max_difference(tuned, back):.1e}")
    table.add_row("predictions that agree", "", "", f"{count_agreeing(tuned, back):,}/{total:,}")
    return table


def _table(*headings: str) -> Table:
    table = Table()
    table.add_column("")
    for heading in headings:
        table.add_column(heading, justify="right")
    return table


def _time(seconds: float) -> str:
    return f"{seconds * 1e3:,.1f} ms" if seconds < 1 else f"{seconds:,.2f} s"
