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
                changed = ", ".join(o.split(".", 1)[1] for o in found["overrides"]) or "defaults"
                peak = found.get("allocated_peak_gib", found["live_peak_gib"])
                times = [f"{found.get(f'seconds_{phase}', 0):.2f}" for phase in PHASES]
                lines.append(
                    [f"{record['device']}, {record['size']}: {changed}", f"{peak:.2f}", f"{found['planned_peak_gib']:.2f}", f"{found.get('live_host_gib', 0):.2f}", f"{found['seconds']:.2f}", *times, f"{found['utilisation']:.0%}", f"{found['samples_per_hour']:.0f}"]
                )
    return rows(header, lines)


def errors(record: dict[str, Any]) -> str:
    table = record["relative_error_of_the_flow"]
    timesteps = list(next(iter(table.values())))
    lines = [[name, *(f"{100 * errors[t]:.2f} %" for t in timesteps)] for name, errors in table.items()]
    caches = record["relative_error_of_a_block_on_a_kept_cache"]
    lines += [[f"KV cache: {name} (at 500)", f"{100 * error:.2f} %", "", "", ""] for name, error in caches.items()]
    return rows(["base", *(f"t = {t}" for t in timesteps)], lines)


def page() -> str:
    parts = [HEAD]
    records = [json.loads(file.read_text()) for file in sorted((HERE / "records").glob("*.json"))]
    gpu = [record for record in records if "allocated_peak_gib" in record["settings"]]
    parts.append("## Full DMD steps (`dmd_step.py`)\n")
    if not gpu:
        parts.append("No record from a GPU yet.\n")
    if records:
        parts.append(steps([*gpu, *(record for record in records if record not in gpu)]) + "\n")
    parts.append("## Against a hand-written script (`minimal.py`)\n")
    record = json.loads((HERE / "minimal.json").read_text())
    parts.append(rows(["", ""], [[key.replace("_", " "), str(value)] for key, value in record.items()]) + "\n")
    parts.append("## Error of each precision against float32 (`precision.py`)\n")
    parts.append(errors(json.loads((HERE / "precision.json").read_text())))
    return "\n".join(parts) + "\n"


if __name__ == "__main__":
    (HERE / "README.md").write_text(page())
