"""Tables of the answers, written between marks of a Markdown file."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from membank.wire.errors import InvalidArgumentError

Figures = Mapping[str, Any]

_MARK = re.compile(r"(<!-- figures: ([a-z-]+) -->\n).*?(<!-- end -->)", re.DOTALL)


def fill_in(path: Path, document: Mapping[str, Any]) -> None:
    """Replace what stands between the marks of a file by tables of a document.

    Parameters
    ----------
    path
        The Markdown file.
    document
        What was measured; marks of questions that it does not hold are left as they are.

    Raises
    ------
    InvalidArgumentError
        If a mark names no table.
    """
    path.write_text(filled(path.read_text(encoding="utf-8"), document), encoding="utf-8")


def filled(text: str, document: Mapping[str, Any]) -> str:
    """Return `text` with the tables of `document` between its marks; otherwise as `fill_in`."""

    def replaced(found: re.Match[str]) -> str:
        begin, name, end = found.groups()
        if name not in TABLES:
            raise InvalidArgumentError(
                f"there is no table {name!r} for a mark; accepted: {', '.join(TABLES)}"
            )
        question, render = TABLES[name]
        answer = document["questions"].get(question)
        if answer is None:
            return found.group()
        return f"{begin}\n{render(answer['figures'])}\n\n{_made(answer)}\n\n{end}"

    return _MARK.sub(replaced, text)


def markdown(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table; all columns but the first are right-aligned."""
    lines = [_line(heads), _line(["---", *["--:"] * (len(heads) - 1)])]
    return "\n".join([*lines, *map(_line, rows)])


def size_of(num_bytes: float) -> str:
    """Return bytes in kB or MB, to two figures or to a whole number."""
    mb = num_bytes / 1e6
    return f"{mb:.0f} MB" if mb >= 10 else f"{mb:.2g} MB" if mb >= 0.95 else f"{mb * 1e3:.0f} kB"


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _ms(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %"


def _made(answer: Mapping[str, Any]) -> str:
    machine = answer["machine"]
    quick = " A quick run: no claim follows from it." if answer["quick"] else ""
    return (
        f"<sub>Commit {answer['commit']}, {answer['time_utc']}, {machine['cores']} cores "
        f"({machine['architecture']}), {machine['file_system']}, load of the last 5 minutes "
        f"{machine['load_5_minutes']:.1f}.{quick}</sub>"
    )


# ---- question 3


def _latency(figures: Figures) -> str:
    sizes = sorted({row["bytes"] for row in figures["rows"]})
    by_key = {(row["source"], row["bytes"]): row for row in figures["rows"]}
    rows = []
    for source, line in figures["lines"].items():
        cells = [
            "/".join(_ms(by_key[source, size][f"p{q}_ms"]) for q in (50, 95, 99)) for size in sizes
        ]
        rows.append([source, *cells, _ms(line["constant_ms"]), _rate(line["units_per_s"])])
    heads = ["p50/p95/p99, ms", *map(size_of, sizes), "constant, ms", "GB/s"]
    note = figures["cold_not_run"]
    return markdown(heads, rows) + (f"\n\nNothing was read from the disk: {note}." if note else "")


def _rate(bytes_per_s: float | None) -> str:
    # What hands out a view has no rate worth a number.
    return "-" if bytes_per_s is None or bytes_per_s > 1e11 else f"{bytes_per_s / 1e9:.2g}"


_CASES = {
    "flat": ("all three levels", sum),
    "hierarchy": ("the same, level 1 at hand", sum),
    "reload": ("levels 2 and 3 alone", lambda sizes: sum(sizes[1:])),
}


def _paper(figures: Figures) -> str:
    paper = figures["paper"]
    medians = {(row["case"], row["source"]): row["p50_ms"] for row in paper["rows"]}
    places = ("disk", "page cache", "resident")
    rows = [
        [what, size_of(count(paper["level_bytes"])), _ms(paper["model_ms"][case]),
         *(_ms(medians[case, place]) if (case, place) in medians else "-" for place in places)]
        for case, (what, count) in _CASES.items()
    ]  # fmt: skip
    heads = ["case", "bytes", "paper's model, ms", *(f"{place}, p50 ms" for place in places)]
    return markdown(heads, rows)


# ---- question 4


def _blocks(figures: Figures) -> str:
    sizes = sorted({row["block_bytes"] for row in figures["rows"]})
    by_key = {(row["way"], row["block_bytes"]): row["median_ms"] for row in figures["rows"]}
    rows = []
    for way, cost in figures["costs"].items():
        rate, knee = cost["bytes_per_s"], cost["knee_bytes"]
        rows.append([
            way, *(_ms(by_key[way, size]) for size in sizes), f"{cost['per_block_us']:.0f}",
            "-" if rate is None else f"{rate / 1e9:.2g}", "-" if knee is None else size_of(knee),
        ])  # fmt: skip
    heads = [
        f"{size_of(figures['total_bytes'])} in blocks of, ms", *map(size_of, sizes),
        "per block, us", "GB/s", "knee",
    ]  # fmt: skip
    return markdown(heads, rows)


# ---- question 5


def _moved(figures: Figures) -> str:
    sizes = sorted({row["cache_fetches"] for row in figures["rows"]})
    shares: dict[tuple[str, str, str], dict[int, float]] = {}
    for row in figures["rows"]:
        key = (row["order"], row["layout"], row["policy"])
        shares.setdefault(key, {})[row["cache_fetches"]] = row["fetched_share"]
    rows = [
        [", ".join(key), *(_percent(found[size]) for size in sizes)]
        for key, found in shares.items()
    ]
    heads = ["bytes moved per request, share of a fetch", *(f"cache of {n}" for n in sizes)]
    return markdown(heads, rows)


def _hits(figures: Figures) -> str:
    rows = [
        [f"{row['order']}, {row['policy']}, cache of {row['cache_fetches']}",
         *(_percent(row["hits"][level]) for level in ("1", "2", "3"))]
        for row in figures["rows"]
        if row["layout"] == "hierarchy" and row["cache_fetches"] in (1, 8)
    ]  # fmt: skip
    return markdown(["hits, hierarchy", "level 1", "level 2", "level 3"], rows)


def _stays(figures: Figures) -> str:
    rows = [
        [str(row["level"]), _percent(row["stay_share"]), _percent(row["by_chance"]),
         f"{row['mean_run']:.1f}", f"{row['mean_session']:.1f}"]
        for row in figures["stays"]
    ]  # fmt: skip
    heads = ["level", "next request stays", "by chance", "requests in a row", "of a session of"]
    return markdown(heads, rows)


# ---- question 6


def _training(figures: Figures) -> str:
    rows = [
        [f"{row['model']}, {row['depth']}", _ms(row["step_ms"]), _ms(row["compute_ms"]),
         _ms(row["fetch_ms"]), _ms(row["push_ms"]), _percent(row["hidden_share"]),
         f"{row['step_to_depth_0']:.2f}"]
        for row in figures["training"]
    ]  # fmt: skip
    heads = [
        "model, depth", "step, ms", "computes", "waits for fetch", "waits for push",
        "hidden (measured)", "step to depth 0",
    ]  # fmt: skip
    return markdown(heads, rows)


def _prompts(figures: Figures) -> str:
    prompts = figures["prompts"]
    rows = [["no memory", "-", _ms(prompts["forward_ms"]), "-", "-", "-"]]
    rows += [
        [f"{row['placement']}, {row['way']}", f"{size_of(row['bytes'])}, {row['place']}",
         _ms(row["first_token_ms"]), _ms(row["waited_ms"]), _percent(row["hidden_share"]),
         _percent(row["expected_share"])]
        for row in prompts["rows"]
    ]  # fmt: skip
    heads = [
        "memory in", "fetched from", "first token, ms", "waited, ms", "hidden (measured)",
        "by the layers' share (arithmetic)",
    ]  # fmt: skip
    return markdown(heads, rows)


def _streams(figures: Figures) -> str:
    rows = []
    for model in figures["models"]:
        name = f"{size_of(model['bytes'])}, {model['layers']} layers"
        rows.append([f"{name}, no memory", "-", "-", _ms(model["forward_ms"]), "-"])
        rows += [
            [f"{name}, {row['link']}, {row['way']}", _ms(row["first_layer_ms"]),
             _ms(row["all_layers_ms"]), _ms(row["first_token_ms"]), _ms(row["waited_ms"])]
            for row in model["rows"]
        ]  # fmt: skip
    heads = ["path, link, way", "first layer, ms", "all layers", "first token", "of that, waited"]
    return markdown(heads, rows)


# ---- question 7


def _batching(figures: Figures) -> str:
    sizes = sorted({row["batch_size"] for row in figures["rows"]})
    rates: dict[tuple[str, str, str], dict[int, float]] = {}
    for row in figures["rows"]:
        key = (row["model"], row["length"], row["way"])
        rates.setdefault(key, {})[row["batch_size"]] = row["tokens_per_s"]
    rows = [
        [", ".join(key), *(f"{found[size]:,.0f}" for size in sizes)] for key, found in rates.items()
    ]
    return markdown(["tokens/s, requests in a batch", *map(str, sizes)], rows)


def _distinct(figures: Figures) -> str:
    rows = [
        [f"{row['order']}, {row['batch_size']}",
         *(f"{row['distinct'][level]:.1f}" for level in ("1", "2", "3")),
         _percent(row["bytes_share"])]
        for row in figures["batches"]
    ]  # fmt: skip
    heads = ["order, requests", "level 1", "level 2", "level 3", "bytes, of separate fetches"]
    return markdown(heads, rows)


TABLES: Mapping[str, tuple[str, Callable[[Figures], str]]] = {
    "latency": ("latency", _latency),
    "paper": ("latency", _paper),
    "blocks": ("block_sizes", _blocks),
    "moved": ("hierarchy", _moved),
    "hits": ("hierarchy", _hits),
    "stays": ("hierarchy", _stays),
    "training": ("overlap", _training),
    "prompts": ("overlap", _prompts),
    "streams": ("layers", _streams),
    "batching": ("batching", _batching),
    "distinct": ("hierarchy", _distinct),
}
"""Question whose figures it shows, and what renders it, by the name in a mark."""
