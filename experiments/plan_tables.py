"""How a plan is shown: the table of `--plan`, and the comment of a flag file."""

from typing import Any

from rich.table import Table

from experiments.progress import CONSOLE, note

GIB = 2**30


def print_plan(plan: dict[str, Any]) -> None:
    """Prints phases, memory, disk and assumptions."""
    assumed, total = plan["assumptions"], plan["total"]
    note(f"plan for {plan['model']['name']}: a prediction, nothing was run")
    table = Table()
    columns = ("phase", "asked for", "scored", "generated", "tokens", "PFLOP", "at most")
    for column in columns:
        table.add_column(column, justify="left" if column == "phase" else "right", no_wrap=True)
    for row in plan["phases"]:
        table.add_row(*_cells(row["name"], row))
    table.add_section()
    table.add_row(*_cells("all", total))
    CONSOLE.print(table)
    for line in [*summary(plan), *assumptions(plan)]:
        note(line)
    if not plan["memory"]["fits"]:
        note(
            f"this does not fit into one {assumed['device']}: lower --cache_mib, --batch_tokens "
            "or --pool_size, or take a smaller --model"
        )


def summary(plan: dict[str, Any]) -> list[str]:
    """Memory, time and disk in a few lines, for people."""
    memory, assumed, total = plan["memory"], plan["assumptions"], plan["total"]
    parts = ", ".join(
        f"{name.replace('_', ' ')} {size / GIB:.1f}" for name, size in memory["parts"].items()
    )
    low, high = total["hours"]
    return [
        f"memory a GPU: {memory['total'] / GIB:.0f} GiB of {memory['device'] / GIB:.0f} ({parts})",
        f"hours: {hours(low)} to {hours(high)} on {assumed['workers']} x {assumed['device']} at "
        f"{assumed['utilisation']:.0%} of peak, without reading data and training the selector",
        f"prompts: {total['asked'][1]:,} asked for, {total['scored'][0]:,} to "
        f"{total['scored'][1]:,} of them scored (none twice), up to {total['generated']:,} answers "
        "generated",
        f"disk: store {plan['disk']['store'] / 1e9:.2f} GB, embeddings "
        f"{plan['disk']['embeddings'] / 1e9:.2f} GB",
    ]


def assumptions(plan: dict[str, Any]) -> list[str]:
    """What the plan takes for granted."""
    assumed, prompt = plan["assumptions"], plan["prompt"]
    return [
        f"assumed: {assumed['image_tokens']:.0f} tokens an image ({assumed['images_sampled']} "
        f"sizes), {prompt['tokens']:.0f} a prompt of {prompt['shots']} shots, bank of "
        f"{assumed['bank']:,} on {assumed['bank_images']:,} images",
        f"assumed: {assumed['certified']:.0%} of answers proven by their scores "
        f"(--plan_certified), {assumed['bandwidth_share']:.0%} of memory bandwidth while decoding, "
        "prefixes kept within a query's batch only, an image encoded once a phase",
        *(f"assumed: {line}" for line in assumed["notes"]),
        "checked: prompts against runs of the embedded world (asked and scored within the "
        "bounds, generated less than half), operations against those counted by torch; the hours "
        "against no GPU yet",
    ]


def hours(value: float) -> str:
    """Hours to two figures; below a tenth of an hour, minutes or seconds."""
    if value >= 9.95:
        return f"{value:,.0f} h"
    if value >= 0.1:
        return f"{value:.1f} h"
    return f"{value * 60:.1f} min" if value >= 1 / 60 else f"{value * 3600:.0f} s"


def _cells(name: str, row: dict[str, Any]) -> list[str]:
    low, high = row["scored"]
    scored = f"{high:,}" if low == high else f"{low:,} to {high:,}"
    asked = f"{row['asked'][1]:,}" if row["asked"][1] else ""
    generated = f"{row['generated']:,}" if row["generated"] else ""
    tokens, flops = f"{row['tokens'] / 1e6:,.1f} M", f"{row['flops'][1] / 1e15:,.3g}"
    return [name, asked, scored if high else "", generated, tokens, flops, hours(row["hours"][1])]
