"""A plan as text."""

from .plan import Plan
from .plan_terms import Term


def plan_text(plan: Plan) -> str:
    """Tables of stages, of what makes up each peak, and of meshes; then warnings and notes."""
    on_gpu = any(stage.device for stage in plan.stages)
    head = ["stage", "RAM", *(["GPU memory"] if on_gpu else []), "disk", "tokens/s", "time"]
    table = [
        [
            stage.name,
            size(stage.ram_bytes),
            *([size(stage.device_bytes) if stage.device else "-"] if on_gpu else []),
            size(stage.disk_bytes) if stage.disk else "-",
            f"{stage.tokens_per_second:,.0f}",
            duration(stage.seconds),
        ]
        for stage in plan.stages
    ]
    lines = [f"planned for {plan.device}", "", *_columns([head, *table]), ""]
    lines += [f"disk, at most {size(plan.disk_bytes)}; all stages one after another {duration(plan.seconds)}", ""]
    for stage in plan.stages:
        for kind, terms in (("RAM", stage.ram), ("GPU memory", stage.device), ("disk", stage.disk)):
            if terms:
                lines += [f"{stage.name}: {kind}", *_terms(terms), ""]
    if plan.layouts:
        lines += [*_meshes(plan), ""]
    lines += [f"WARNING {warning}" for warning in plan.warnings] or ["everything fits"]
    lines += [f"note: {note}" for note in plan.notes]
    return "\n".join(lines)


def _terms(terms: list[Term]) -> list[str]:
    shown = [term for term in terms if term.num_bytes >= 0.5e6] or terms
    return ["  " + line for line in _columns([[size(t.num_bytes), t.name, t.why] for t in shown], left=(1, 2))]


def _meshes(plan: Plan) -> list[str]:
    head = [
        "data x feature",
        "memory/GPU",
        "sent over data",
        "over feature",
        "step",
        "tokens/s",
        "efficiency",
        "80 % at",
    ]
    rows = []
    for mesh in plan.layouts:
        wanted = plan.wanted_batch[f"{mesh.data} x {mesh.feature}"]
        rows.append(
            [
                f"{mesh.data} x {mesh.feature}",
                size(mesh.memory_bytes),
                size(mesh.data_wire_bytes),
                size(mesh.feature_wire_bytes),
                f"{mesh.step_seconds * 1e3:.2f} ms",
                f"{mesh.tokens_per_second / 1e6:,.2f} M",
                f"{mesh.efficiency:.0%}",
                f"batch {wanted:,}" if wanted else "-",
            ]
        )
    title = "training step on the mesh; bytes each GPU sends in one step, nothing overlapped"
    return [title, *_columns([head, *rows])]


def _columns(rows: list[list[str]], left: tuple[int, ...] = (0,)) -> list[str]:
    widths = [max(len(row[n]) for row in rows) for n in range(len(rows[0]))]
    return [
        "  ".join(f"{v:<{w}}" if n in left else f"{v:>{w}}" for n, (v, w) in enumerate(zip(row, widths, strict=True)))
        .rstrip()
        for row in rows
    ]  # fmt: skip


def size(num_bytes: float) -> str:
    """Bytes in a unit that reads well."""
    for limit, unit in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB")):
        if num_bytes >= limit:
            return f"{num_bytes / limit:.2f} {unit}" if unit != "MB" else f"{num_bytes / limit:.0f} MB"
    return f"{num_bytes / 1e3:.0f} kB" if num_bytes else "0"


def duration(seconds: float) -> str:
    """Seconds, minutes or hours."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
