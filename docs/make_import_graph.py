"""Draws docs/assets/import-graph.svg. Run ``python docs/make_import_graph.py`` after moving a file.

A box is a file or a sub-package. An arrow points to what it imports. Arrows that follow from others are left out.
"""

import ast
import pathlib

ROOT = pathlib.Path(__file__).resolve().parents[1]
LIBRARY = ROOT / "src" / "torchjax_bridge"
PICTURE = ROOT / "docs" / "assets" / "import-graph.svg"

WIDTH, HEIGHT, GAP, ROW_GAP, MARGIN = 124, 30, 14, 44, 16
Graph = dict[str, set[str]]


def imports(root: pathlib.Path, depth: int) -> Graph:
    """What each box of a package imports. A box is named by segment ``depth`` of a file's path in the library."""
    found: Graph = {}
    for file in sorted(root.rglob("*.py")):
        own = _box(file.relative_to(LIBRARY).with_suffix("").parts, depth)
        if own is None:
            continue
        targets = found.setdefault(own, set())
        package = file.relative_to(LIBRARY).parts[:-1]
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom):
                for parts in _targets(node, package):
                    target = _box(parts, depth)
                    if target is not None and target != own and _exists(root / target):
                        targets.add(target)
    return found


def _exists(box: pathlib.Path) -> bool:
    return box.is_dir() or box.with_suffix(".py").exists()


def _targets(node: ast.ImportFrom, package: tuple[str, ...]) -> list[tuple[str, ...]]:
    """What an import names, as segments below the library."""
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


def transitive_reduction(graph: Graph) -> Graph:
    """The graph without arrows that follow from others."""

    def reach(node: str) -> set[str]:
        return graph.get(node, set()).union(*(reach(other) for other in graph.get(node, ())))

    return {
        node: {other for other in others if not any(other in reach(third) for third in others - {other})}
        for node, others in graph.items()
    }


def levels(graph: Graph) -> dict[str, int]:
    """The row of each box; row 0 imports nothing, and each box is above all that it imports."""
    found: dict[str, int] = {}

    def level(node: str) -> int:
        if node not in found:
            found[node] = 1 + max(map(level, graph.get(node, ())), default=-1)
        return found[node]

    for node in graph:
        level(node)
    return found


def draw(title: str, graph: Graph, left: int, top: int) -> tuple[str, int, int]:
    """One package in a frame: its SVG, its width and its height."""
    rows: dict[int, list[str]] = {}
    for node, level in levels(graph).items():
        rows.setdefault(level, []).append(node)
    count = max(map(len, rows.values()))
    width = count * WIDTH + (count + 1) * GAP
    height = len(rows) * HEIGHT + (len(rows) + 1) * ROW_GAP - GAP
    places = {}
    for level, row in rows.items():
        used = len(row) * WIDTH + (len(row) - 1) * GAP
        for number, node in enumerate(sorted(row)):
            x = left + (width - used) / 2 + number * (WIDTH + GAP)
            places[node] = (x, top + height - (level + 1) * (HEIGHT + ROW_GAP) + GAP)
    parts = [
        f'<rect class="package" x="{left}" y="{top}" width="{width}" height="{height}" rx="8"/>',
        f'<text class="title" x="{left + 12}" y="{top + 22}">{title}</text>',
    ]
    for node, others in transitive_reduction(graph).items():
        for other in sorted(others):
            (x1, y1), (x2, y2) = places[node], places[other]
            x1, x2, y1 = x1 + WIDTH / 2, x2 + WIDTH / 2, y1 + HEIGHT
            bend = (y2 - y1) / 2
            parts.append(
                f'<path class="arrow" marker-end="url(#tip)" '
                f'd="M{x1:.0f},{y1:.0f} C{x1:.0f},{y1 + bend:.0f} {x2:.0f},{y2 - bend:.0f} {x2:.0f},{y2 - 4:.0f}"/>'
            )
    for node, (x, y) in places.items():
        folder = any((parent / node).is_dir() for parent in (LIBRARY, LIBRARY / title))
        parts.append(
            f'<rect class="{"folder" if folder else "file"}" x="{x:.0f}" y="{y:.0f}" width="{WIDTH}" '
            f'height="{HEIGHT}" rx="4"/><text x="{x + WIDTH / 2:.0f}" y="{y + 20:.0f}">{node}</text>'
        )
    return "\n".join(parts), width, height


STYLE = """<style>
text { font: 13px ui-monospace, monospace; text-anchor: middle; fill: #1f2937 }
.title { font: bold 15px system-ui, sans-serif; text-anchor: start }
.package { fill: #f8fafc; stroke: #94a3b8 }
.file { fill: #ffffff; stroke: #64748b }
.folder { fill: #e0e7ff; stroke: #4338ca }
.arrow { fill: none; stroke: #64748b; stroke-width: 1.2 }
</style>
<defs><marker id="tip" viewBox="0 0 8 8" refX="6" refY="4" markerWidth="7" markerHeight="7" orient="auto">
<path d="M0,0 L8,4 L0,8 z" fill="#64748b"/></marker></defs>"""


def picture() -> str:
    """The whole picture."""
    top = {name: others - {"_lazy"} for name, others in imports(LIBRARY, 0).items() if name != "_lazy"}
    drawn, y, widest = [], MARGIN, 0
    for title, graph in [
        ("torchjax_bridge", top),
        ("weights", imports(LIBRARY / "weights", 1)),
        ("wrap", imports(LIBRARY / "wrap", 1)),
        ("exchange", imports(LIBRARY / "exchange", 1)),
    ]:
        text, width, height = draw(title, graph, MARGIN, y)
        drawn.append(text)
        y, widest = y + height + MARGIN, max(widest, width + 2 * MARGIN)
    box = f'viewBox="0 0 {widest} {y}" role="img" aria-label="What imports what"'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" {box}>'
    return "\n".join([head, STYLE, *drawn, "</svg>\n"])


if __name__ == "__main__":
    PICTURE.write_text(picture())
