"""Draws docs/assets/floor-plan.svg from the imports. Run ``python docs/make_floor_plan.py`` after moving a file.

A box is a file or a sub-room. An arrow points to what it imports. What a chain of others implies
is left out.
"""

import ast
import pathlib

ROOT = pathlib.Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "src" / "torchjax_bridge"
PICTURE = ROOT / "docs" / "assets" / "floor-plan.svg"

WIDTH, HEIGHT, GAP, RISE, MARGIN = 124, 30, 14, 44, 16
Graph = dict[str, set[str]]


def imports(room: pathlib.Path, depth: int) -> Graph:
    """Which boxes of a room import which others; a box is what stands ``depth`` segments below the package."""
    found: Graph = {}
    for file in sorted(room.rglob("*.py")):
        own = _box(file.relative_to(PACKAGE).with_suffix("").parts, depth)
        if own is None:
            continue
        targets = found.setdefault(own, set())
        package = file.relative_to(PACKAGE).parts[:-1]
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom):
                for parts in _targets(node, package):
                    target = _box(parts, depth)
                    if (
                        target not in (None, own)
                        and (room / target).with_suffix(".py").exists() | (room / target).is_dir()
                    ):
                        targets.add(target)
    return found


def _exists(box: pathlib.Path) -> bool:
    return box.is_dir() or box.with_suffix(".py").exists()


def _targets(node: ast.ImportFrom, package: tuple[str, ...]) -> list[tuple[str, ...]]:
    """What an import names, as segments below the package of the library."""
    module = tuple(node.module.split(".")) if node.module else ()
    if node.level:
        base = package[: len(package) - node.level + 1]
    elif module[:1] == ("torchjax_bridge",):
        base, module = (), module[1:]
    else:
        return []
    return [(*base, *module, alias.name) for alias in node.names]


def _box(parts: tuple[str, ...], depth: int) -> str | None:
    if len(parts) <= depth or parts[depth] in ("__init__", "__main__"):
        return None
    return parts[depth]


def thinned(graph: Graph) -> Graph:
    """The graph without arrows that a chain of others implies."""

    def reach(node: str) -> set[str]:
        return graph.get(node, set()).union(*(reach(other) for other in graph.get(node, ())))

    return {
        node: {other for other in others if not any(other in reach(third) for third in others - {other})}
        for node, others in graph.items()
    }


def levels(graph: Graph) -> dict[str, int]:
    """How far each box is above those that import nothing."""
    found: dict[str, int] = {}

    def level(node: str) -> int:
        if node not in found:
            found[node] = 1 + max(map(level, graph.get(node, ())), default=-1)
        return found[node]

    for node in graph:
        level(node)
    return found


def draw(title: str, graph: Graph, left: int, top: int) -> tuple[str, int, int]:
    """One room as a framed picture: the text of it, its width and its height."""
    rows: dict[int, list[str]] = {}
    for node, level in levels(graph).items():
        rows.setdefault(level, []).append(node)
    count = max(map(len, rows.values()))
    width = count * WIDTH + (count + 1) * GAP
    height = len(rows) * HEIGHT + (len(rows) + 1) * RISE - GAP
    places = {}
    for level, row in rows.items():
        used = len(row) * WIDTH + (len(row) - 1) * GAP
        for number, node in enumerate(sorted(row)):
            x = left + (width - used) / 2 + number * (WIDTH + GAP)
            places[node] = (x, top + height - (level + 1) * (HEIGHT + RISE) + GAP)
    parts = [
        f'<rect class="room" x="{left}" y="{top}" width="{width}" height="{height}" rx="8"/>',
        f'<text class="title" x="{left + 12}" y="{top + 22}">{title}</text>',
    ]
    for node, others in thinned(graph).items():
        for other in sorted(others):
            (x1, y1), (x2, y2) = places[node], places[other]
            x1, x2, y1 = x1 + WIDTH / 2, x2 + WIDTH / 2, y1 + HEIGHT
            bend = (y2 - y1) / 2
            parts.append(
                f'<path class="arrow" marker-end="url(#tip)" '
                f'd="M{x1:.0f},{y1:.0f} C{x1:.0f},{y1 + bend:.0f} {x2:.0f},{y2 - bend:.0f} {x2:.0f},{y2 - 4:.0f}"/>'
            )
    for node, (x, y) in places.items():
        folder = any((room / node).is_dir() for room in (PACKAGE, PACKAGE / title))
        parts.append(
            f'<rect class="{"folder" if folder else "file"}" x="{x:.0f}" y="{y:.0f}" width="{WIDTH}" '
            f'height="{HEIGHT}" rx="4"/><text x="{x + WIDTH / 2:.0f}" y="{y + 20:.0f}">{node}</text>'
        )
    return "\n".join(parts), width, height


STYLE = """<style>
text { font: 13px ui-monospace, monospace; text-anchor: middle; fill: #1f2937 }
.title { font: bold 15px system-ui, sans-serif; text-anchor: start }
.room { fill: #f8fafc; stroke: #94a3b8 }
.file { fill: #ffffff; stroke: #64748b }
.folder { fill: #e0e7ff; stroke: #4338ca }
.arrow { fill: none; stroke: #64748b; stroke-width: 1.2 }
</style>
<defs><marker id="tip" viewBox="0 0 8 8" refX="6" refY="4" markerWidth="7" markerHeight="7" orient="auto">
<path d="M0,0 L8,4 L0,8 z" fill="#64748b"/></marker></defs>"""


def picture() -> str:
    """The whole picture."""
    house = {
        name: {o for o in others if o != "_lazy"}
        for name, others in imports(PACKAGE, 0).items()
        if name != "_lazy"
    }
    drawn, y, widest = [], MARGIN, 0
    for title, graph in [
        ("torchjax_bridge", house),
        ("weights", imports(PACKAGE / "weights", 1)),
        ("wrap", imports(PACKAGE / "wrap", 1)),
        ("exchange", imports(PACKAGE / "exchange", 1)),
    ]:
        text, width, height = draw(title, graph, MARGIN, y)
        drawn.append(text)
        y, widest = y + height + MARGIN, max(widest, width + 2 * MARGIN)
    box = f'viewBox="0 0 {widest} {y}" role="img" aria-label="The floor plan"'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" {box}>'
    return "\n".join([head, STYLE, *drawn, "</svg>\n"])


if __name__ == "__main__":
    PICTURE.write_text(picture())
