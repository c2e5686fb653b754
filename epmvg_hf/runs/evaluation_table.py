"""The results of an evaluation as Markdown."""

from typing import Any


def make_table(results: list[dict[str, Any]]) -> str:
    """
    Write Markdown tables: one with a row for each split, and one with the groups of each split.

    Args:
        results (`list[dict]`): what [`~benchmark_evaluation.evaluate_split`] gives for each split.
    """
    lines = [
        "| benchmark | split | expressions | images | Acc@0.5 (95 % interval) | any box | mean IoU "
        "| calibration error | AUROC of absence | expressions/s |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for result in results:
        scores = result.get("scores", {})
        cells = [
            result["benchmark"],
            result["split"],
            f"{result['expressions']:,}",
            f"{result['images']:,}",
            _accuracy(result, "acc@0.5"),
            _accuracy(result, "any_box_acc@0.5") if "any_box_acc@0.5" in result else "",
            f"{result['mean_iou']:.3f}",
            *(f"{scores[name]:.3f}" if name in scores else "" for name in ("calibration_error", "presence_auroc")),
            f"{result['expressions_per_second']:.0f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    lines += [
        "",
        "| benchmark | split | what | group | expressions | Acc@0.5 |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for result in results:
        for title, groups in result["groups"].items():
            for group in groups:
                where = f"{result['benchmark']} | {result['split']} | {title.replace('_', ' ')}"
                lines.append(f"| {where} | {group['name']} | {group['count']:,} | {100 * group['accuracy']:.2f} |")
    return "\n".join(lines) + "\n"


def _accuracy(result: dict[str, Any], name: str) -> str:
    """An accuracy with its 95 % interval, in percent."""
    low, high = result[f"{name}_interval"]
    return f"{100 * result[name]:.2f} ({100 * low:.2f} to {100 * high:.2f})"
