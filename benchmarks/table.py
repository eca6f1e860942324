"""Writes benchmarks/README.md from the records that lie beside it: python benchmarks/table.py"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
PHASES = ("rollout", "scores", "replay", "critic", "optimizer")
HEAD = """# Records

Made by `python benchmarks/table.py` from the JSON files in this folder, and from nothing else. What each column means stands in
the docstring of the script that made the record. Longer records: [wan_tiny.md](wan_tiny.md) (quality of the 3-step student),
[wan_tiny_causal.md](wan_tiny_causal.md) (the causal student), [replay.md](replay.md) (replay backward).
"""


def rows(header: list[str], lines: list[list[str]]) -> str:
    align = ["---"] + ["---:"] * (len(header) - 1)
    return "\n".join("| " + " | ".join(line) + " |" for line in (header, align, *lines))


def steps(records: list[dict[str, Any]]) -> str:
    header = [
        "device, model, settings",
        "peak GiB",
        "planned",
        "host GiB",
        "s a step",
        *PHASES,
        "utilisation",
        "samples/h",
    ]
    lines = []
    for record in records:
        for part in ("settings", "compared"):
            if part in record:
                found = record[part]
                times = [f"{found.get(f'seconds_{phase}', 0):.2f}" for phase in PHASES]
                sizes = [f"{size:.2f}" for size in (peak(found), found["planned_peak_gib"], found["live_host_gib"])]
                on_gpu = "allocated_peak_gib" in found  # a CPU's rate is that of the moment
                rates = [f"{found['utilisation']:.0%}" if on_gpu else "", f"{found['samples_per_hour']:.0f}"]
                lines.append([label(record, found), *sizes, f"{found['seconds']:.2f}", *times, *rates])
    return rows(header, lines)


def label(record: dict[str, Any], part: dict[str, Any]) -> str:
    changed = ", ".join(o.split(".", 1)[1] for o in part["overrides"]) or "defaults"
    return f"{record['device']}, {record['size']}: {changed}"


def peak(part: dict[str, Any]) -> float:
    return part.get("allocated_peak_gib", part["live_peak_gib"])


def options(records: list[dict[str, Any]]) -> str:
    """What the second setting of a record changes against the first."""
    lines = []
    for record in records:
        before, after = record["settings"], record["compared"]
        change = ", ".join(o for o in after["overrides"] if o not in before["overrides"])
        times = f"{after['seconds'] / before['seconds']:.2f}"
        sizes = [f"{peak(after) / peak(before):.2f}", f"{after['live_host_gib'] - before['live_host_gib']:.2f}"]
        lines.append([label(record, before), f"`{change}`", times, *sizes])
    return rows(["device, model, settings", "with", "time x", "peak x", "host + GiB"], lines)


def profiles(records: list[dict[str, Any]]) -> str:
    lines = []
    for record in records:
        shares = [f"{name} {share:.0%}" for name, share in list(record["settings"]["profile"].items())[:8]]
        lines.append([label(record, record["settings"]), ", ".join(shares)])
    return rows(["device, model, settings", "operations by their own time"], lines)


def errors(record: dict[str, Any]) -> str:
    table = record["relative_error_of_the_flow"]
    timesteps = list(next(iter(table.values())))
    lines = [[name, *(f"{100 * errors[t]:.2f} %" for t in timesteps)] for name, errors in table.items()]
    texts = record["relative_error_of_an_embedding"]
    lines += [[f"text encoder: {name}", f"{100 * error:.2f} %", "", "", ""] for name, error in texts.items()]
    caches = record["relative_error_of_a_block_on_a_kept_cache"]
    lines += [[f"KV cache: {name} (at 500)", f"{100 * error:.2f} %", "", "", ""] for name, error in caches.items()]
    return rows(["base", *(f"t = {t}" for t in timesteps)], lines)


def block(record: dict[str, Any]) -> str:
    lines = []
    for row in record["rows"]:
        settings = f"{record['device']}, {record['size']}: {record['tokens']} tokens, timesteps {row['timesteps']}"
        peaks = [f"{row[f'peak_gib_{name}']:.2f}" for name in ("stock", "split")]
        lines.append([settings, *peaks, f"{row['seconds_stock']:.2f}", f"{row['seconds_split_over_stock']:.2f}"])
    return rows(["device, block", "peak GiB, stock", "split", "s, stock", "time x"], lines)


def data(record: dict[str, Any]) -> str:
    parts = {"machine": record} | {name: part for name, part in record.items() if isinstance(part, dict)}
    lines = []
    for name, part in parts.items():
        found = {key: value for key, value in part.items() if not isinstance(value, dict)}
        lines += [
            [name.replace("_", " "), key.replace("_", " "), f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"]
            for key, value in found.items()
        ]
    return rows(["", "", ""], lines)


def page() -> str:
    parts = [HEAD]
    records = [json.loads(file.read_text()) for file in sorted((HERE / "records").glob("*.json"))]
    gpu = [record for record in records if "allocated_peak_gib" in record["settings"]]
    parts.append("## Full DMD steps (`dmd_step.py`)\n")
    if not gpu:
        parts.append("No record from a GPU yet.\n")
    records = [*gpu, *(record for record in records if record not in gpu)]
    parts.append(steps(records) + "\n")
    if compared := [record for record in records if "compared" in record]:
        parts.append("## What an option changes (two settings, step by step in turn)\n")
        parts.append(options(compared) + "\n")
    if profiled := [record for record in records if "profile" in record["settings"]]:
        parts.append("## Where a step's time goes\n")
        parts.append(profiles(profiled) + "\n")
    parts.append("## Against a hand-written script (`minimal.py`)\n")
    record = json.loads((HERE / "minimal.json").read_text())
    parts.append(rows(["", ""], [[key.replace("_", " "), str(value)] for key, value in record.items()]) + "\n")
    parts.append("## A block by piece against Diffusers' own (`block.py`)\n")
    parts.append(block(json.loads((HERE / "block.json").read_text())) + "\n")
    parts.append("## Error of each precision against float32 (`precision.py`)\n")
    parts.append(errors(json.loads((HERE / "precision.json").read_text())) + "\n")
    parts.append("## Data (`data.py`)\n")
    parts.append(data(json.loads((HERE / "data.json").read_text())))
    return "\n".join(parts) + "\n"


if __name__ == "__main__":
    (HERE / "README.md").write_text(page())
