"""Draws docs/assets/weight-sync.svg: what a link copies, and when. Run ``python docs/make_sync_picture.py``.

A column is a step of a training loop. A bar is a piece of memory, for as long as it lives.
"""

import pathlib

PICTURE = pathlib.Path(__file__).resolve().parents[1] / "docs" / "assets" / "weight-sync.svg"

COLUMN, ROW, LEFT, TOP, BAR = 104, 46, 186, 64, 22
STEPS = ["link", "push", "step", "push", "step", "push", "pull"]
# (name, first step, step after the last, class, what is written above the bar)
BARS = [
    ("torch parameters", 0, 7, "torch", "one memory; the optimizer and pull() write to it"),
    ("arrays of push 1", 1, 3, "jax", "freed once replaced"),
    ("arrays of push 2", 3, 7, "held", "somebody holds them: values kept"),
    ("arrays of push 3", 5, 7, "jax", "new memory"),
]
# (column, from row, to row, label): a copy
COPIES = [(1, 0, 1), (3, 0, 2), (5, 0, 3), (6, 3, 0)]

STYLE = """<style>
text { font: 13px system-ui, sans-serif; fill: #1f2937 }
.step { text-anchor: middle; font-weight: bold }
.name { text-anchor: end }
.note { font-size: 12px; fill: #ffffff }
.line { stroke: #cbd5e1; stroke-dasharray: 3 3 }
.torch { fill: #c2410c } .jax { fill: #4338ca } .held { fill: #0f766e }
.copy { stroke: #1f2937; stroke-width: 1.6; fill: none }
.ground { fill: #f8fafc; stroke: #94a3b8 }
</style>
<defs><marker id="end" viewBox="0 0 8 8" refX="6" refY="4" markerWidth="7" markerHeight="7" orient="auto">
<path d="M0,0 L8,4 L0,8 z" fill="#1f2937"/></marker></defs>"""


def picture() -> str:
    """The whole picture."""
    width, height = LEFT + COLUMN * len(STEPS) + 16, TOP + ROW * len(BARS) + 44
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img" '
        'aria-label="What a link copies, and when">',
        STYLE,
        f'<rect class="ground" x="0.5" y="0.5" width="{width - 1}" height="{height - 1}" rx="6"/>',
    ]
    for column, step in enumerate(STEPS):
        x = LEFT + COLUMN * (column + 0.5)
        parts.append(f'<text class="step" x="{x:.0f}" y="36">{step}</text>')
        parts.append(f'<line class="line" x1="{x:.0f}" y1="46" x2="{x:.0f}" y2="{height - 36}"/>')
    for row, (name, first, last, kind, note) in enumerate(BARS):
        y = TOP + ROW * row
        x, size = LEFT + COLUMN * first + 6, COLUMN * (last - first) - 12
        parts.append(f'<text class="name" x="{LEFT - 10}" y="{y + 16}">{name}</text>')
        parts.append(f'<rect class="{kind}" x="{x}" y="{y}" width="{size}" height="{BAR}" rx="4"/>')
        parts.append(f'<text class="note" x="{x + 10}" y="{y + 15}">{note}</text>')
    for column, start, end in COPIES:
        x = LEFT + COLUMN * (column + 0.5) + (30 if column != 6 else 0)
        y1, y2 = (
            TOP + ROW * start + (BAR if end > start else 0),
            TOP + ROW * end + (0 if end > start else BAR),
        )
        sign = -3 if end > start else 3
        parts.append(f'<path class="copy" marker-end="url(#end)" d="M{x:.0f},{y1} L{x:.0f},{y2 + sign}"/>')
    legend = "An arrow copies every weight once, laid out and cast on the way. The step link copies nothing."
    parts.append(f'<text x="16" y="{height - 14}">{legend}</text>')
    return "\n".join([*parts, "</svg>\n"])


if __name__ == "__main__":
    PICTURE.write_text(picture())
