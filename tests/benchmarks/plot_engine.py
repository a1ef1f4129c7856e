"""Draws what `soloist bench engine --json` printed: per case a step's time by op group beside its floor, and the ratio to the
floor against the context.

    plot_engine.py RESULT.json OUT.svg
"""

import json
import sys

COLORS = ["#4878a8", "#e49444", "#6a9f58", "#d1615d", "#85b6b2", "#e7ca60", "#a87c9f", "#967662", "#b8b0ac"]
WIDTH, BAR, GAP, LEFT = 900, 22, 34, 170


def text(x, y, what, size=12, anchor="start"):
    return f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size}" text-anchor="{anchor}">{what}</text>'


def bars(cases, out, top):
    """A bar per case: its groups one after the other (measured one by one, without overlap), then step and floor."""
    longest = max(max(sum(c["decode"]["group_us"].values()), c["decode"]["step_ms"] * 1e3) for c in cases)
    scale = (WIDTH - LEFT - 90) / longest
    groups = list(dict.fromkeys(g for c in cases for g in c["decode"]["group_us"]))
    for i, group in enumerate(groups):
        x, y = LEFT + (i % 5) * 140, top + 16 * (i // 5)
        out.append(f'<rect x="{x}" y="{y - 9}" width="10" height="10" fill="{COLORS[i % len(COLORS)]}"/>')
        out.append(text(x + 14, y, group))
    y = top + 16 * ((len(groups) + 4) // 5) + 8
    for c in cases:
        decode, x = c["decode"], LEFT
        out.append(text(LEFT - 6, y + 15, f'{c["batch"]} x {c["prompt_length"]}', anchor="end"))
        for i, group in enumerate(groups):
            w = decode["group_us"].get(group, 0) * scale
            out.append(f'<rect x="{x:.1f}" y="{y}" width="{w:.1f}" height="{BAR}" fill="{COLORS[i % len(COLORS)]}"/>')
            x += w
        for name, us, color in [("step", decode["step_ms"] * 1e3, "#000"), ("floor", decode["floor_ms"] * 1e3, "#c00")]:
            at = LEFT + us * scale
            out.append(f'<line x1="{at:.1f}" x2="{at:.1f}" y1="{y - 4}" y2="{y + BAR + 4}" stroke="{color}" stroke-width="2"/>')
            out.append(text(at, y + BAR + 15, f"{name} {us:.0f} us", 10, "end" if name == "floor" else "start"))
        y += BAR + GAP
    return y


def ratios(cases, out, top):
    """Step time over floor against context, a line per batch."""
    height, widest = 200, max(c["prompt_length"] for c in cases)
    most = max(1.3, 1.05 * max(c["decode"]["ratio"] for c in cases))
    place = lambda c: (LEFT + c["prompt_length"] / widest * (WIDTH - LEFT - 130),
                       top + height - (c["decode"]["ratio"] - 1) / (most - 1) * height)
    out.append(text(LEFT, top - 10, "decode step / floor against context (tokens)", 13))
    for tick in range(5):
        ratio = 1 + (most - 1) * tick / 4
        y = top + height - height * tick / 4
        out.append(f'<line x1="{LEFT}" x2="{WIDTH - 20}" y1="{y:.1f}" y2="{y:.1f}" stroke="#ddd"/>')
        out.append(text(LEFT - 6, y + 4, f"{ratio:.2f}", anchor="end"))
    for i, batch in enumerate(sorted({c["batch"] for c in cases})):
        mine = sorted((c for c in cases if c["batch"] == batch), key=lambda c: c["prompt_length"])
        points = [place(c) for c in mine]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        out.append(f'<polyline points="{path}" fill="none" stroke="{COLORS[i]}" stroke-width="2"/>')
        for c, (x, y) in zip(mine, points):
            out.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{COLORS[i]}"/>')
            out.append(text(x + 5, y - 6, f'{c["decode"]["ratio"]:.3f} (batch {batch})', 10))
            out.append(text(x, top + height + 15, str(c["prompt_length"]), 10, "middle"))
    return top + height + 30


def main():
    with open(sys.argv[1], encoding="utf-8") as file:
        result = json.load(file)
    out = [text(20, 22, f'{result["model"]} {result["slice"]} on {result["device"]}, read {result["machine"]["read_gb_per_s"]:.0f} GB/s', 15),
           text(20, 42, "decode step: op groups measured one by one (coloured), the step as it runs (black), its floor (red)")]
    y = ratios(result["cases"], out, bars(result["cases"], out, 66) + 30)
    with open(sys.argv[2], "w", encoding="utf-8") as file:
        file.write(f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{y:.0f}" font-family="sans-serif">'
                   f'<rect width="100%" height="100%" fill="#fff"/>{"".join(out)}</svg>\n')


if __name__ == "__main__":
    main()
