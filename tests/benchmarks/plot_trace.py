"""Draws some layers of one step of a trace (--trace): a computation and a communication track per rank, coloured by micro-batch.

    plot_trace.py OUT.svg STEP FIRST_LAYER LAYERS TRACE...

Several files: those of workers of one host (TRACE.rankR). The picture begins with rank 0's attention of FIRST_LAYER.
"""

import json
import sys

WIDTH, LEFT, TRACK, GAP, TOP = 1180, 150, 24, 16, 64
# By what it is: of micro-batch A, of B.
COLORS = {
    "attention": ("#4878a8", "#e49444"),
    "router": ("#7ba0c4", "#eeb880"),
    "expert": ("#2f5478", "#b86a1c"),
    "dispatch": ("#9fb9d3", "#f4d2ad"),
    "combine": ("#9fb9d3", "#f4d2ad"),
    "wait": ("#eeeeee", "#eeeeee"),
}
KIND = {"attention_linear": "attention"}


def spans(files):
    """By (rank, track): start, end, name, micro-batch (0, 1 or None) of one step's spans."""
    tracks = {}
    for path, step in files:
        with open(path, encoding="utf-8") as file:
            for event in json.load(file):
                if event["ph"] != "X" or event["args"]["step"] != step:
                    continue
                name, half = event["name"], None
                if name.endswith((" A", " B")):
                    name, half = name[:-2], "AB".index(name[-1])
                spans_of = tracks.setdefault((event["pid"], event["tid"]), [])
                spans_of.append((event["ts"], event["ts"] + event["dur"], name, half))
    return tracks


def window(tracks, first_layer, layers):
    """The time of the layers on rank 0, by its attention of micro-batch A."""
    starts = [s for s, _, name, half in tracks[(0, 1)] if name == "attention" and half == 0]
    linear = [s for s, _, name, half in tracks[(0, 1)] if name == "attention_linear" and half == 0]
    begin = max(s for s in linear if s < starts[first_layer])
    last = first_layer + layers
    end = max(s for s in linear if s < starts[last]) if last < len(starts) else max(e for _, e, _, _ in tracks[(0, 1)])
    return begin, end


def draw(tracks, begin, end, out):
    scale = (WIDTH - LEFT - 10) / (end - begin)
    y = TOP
    for rank in sorted({rank for rank, _ in tracks}):
        for track, title in ((1, "computes"), (2, "communicates")):
            out.append(f'<text x="{LEFT - 8}" y="{y + 16}" text-anchor="end">rank {rank} {title}</text>')
            out.append(f'<rect x="{LEFT}" y="{y}" width="{WIDTH - LEFT - 10}" height="{TRACK}" fill="#fafafa"/>')
            for start, stop, name, half in sorted(tracks.get((rank, track), [])):
                if half is None or stop <= begin or start >= end:
                    continue
                kind = KIND.get(name, name)
                x, right = LEFT + (max(start, begin) - begin) * scale, LEFT + (min(stop, end) - begin) * scale
                if right - x < 0.15:
                    continue
                label = f"{kind} {'AB'[half]}"
                out.append(f'<rect x="{x:.1f}" y="{y}" width="{right - x:.1f}" height="{TRACK}" fill="{COLORS[kind][half]}"'
                           f' stroke="#fff" stroke-width="0.3"><title>{label}, {(stop - start) / 1e3:.2f} ms</title></rect>')
                if right - x > 7 * len(label):
                    dark = kind in ("attention", "expert")
                    out.append(f'<text x="{(x + right) / 2:.1f}" y="{y + 16}" text-anchor="middle" font-size="10"'
                               f' fill="{"#fff" if dark else "#222"}">{label}</text>')
            y += TRACK + 2
        y += GAP
    return y


def main():
    out_path, step, first_layer, layers, *paths = sys.argv[1:]
    tracks = spans([(path, int(step)) for path in paths])
    begin, end = window(tracks, int(first_layer), int(layers))
    body = []
    bottom = draw(tracks, begin, end, body)
    ms = (end - begin) / 1e3
    head = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{bottom + 20}" font-family="sans-serif" font-size="12">',
        f'<rect width="{WIDTH}" height="{bottom + 20}" fill="#fff"/>',
        f'<text x="{LEFT}" y="22" font-size="14">Two micro-batches, A (blue) and B (orange): {layers} layers of a prefill step'
        f" on {len({rank for rank, _ in tracks})} ranks, {ms:.1f} ms</text>",
        f'<text x="{LEFT}" y="42">pale above: rows are put together, awaited (light grey) and added up;'
        " pale below: rows travel</text>",
    ]
    with open(out_path, "w", encoding="utf-8") as file:
        file.write("\n".join(head + body + ["</svg>"]) + "\n")


if __name__ == "__main__":
    main()
