"""The folder that ships: the finished nano in bf16, its tokenizer, its numbers, and a model card drawn from them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kimi_linear.studies.cells import write_json
from kimi_linear.studies.nano_data import KINDS, read_about

if TYPE_CHECKING:
    from kimi_linear.studies.nano import NanoConfig

RESULTS, CARD = "results.json", "MODEL_CARD.md"
MAX_BYTES = 16 << 20
"""Of the weights."""


def package(config: NanoConfig, folder: Path) -> None:
    """Write ``config.package`` from the best finished cells in ``folder`` at ``config.tokens``.

    Raises:
        FileNotFoundError: the nano or its twin has no finished cell. ValueError: they were trained in different ways, or
            the weights are larger than 16 MiB.
    """
    from kimi_linear.data import load_tokenizer
    from kimi_linear.folder import load, save

    best = {which: best_cell(config, folder, which) for which in ("nano", "twin")}
    ours, theirs = ({**values["settings"], "model": ""} for _, values in best.values())
    if ours != theirs:
        raise ValueError(f"twin: expected the settings of the nano, {ours}, got {theirs}; train it with the same flags")
    results = {
        "sources": read_about(config.data)["sources"],
        **{which: {"sweep": sweep(config, folder, which), **values} for which, (_, values) in best.items()},
    }
    model, _ = load(best["nano"][0])
    new = config.package.with_name(f".{config.package.name}.new")
    shutil.rmtree(new, ignore_errors=True)
    save(model, new, load_tokenizer(config.data))
    size = sum(file.stat().st_size for file in new.glob("*.safetensors"))
    if size > MAX_BYTES:
        shutil.rmtree(new)
        raise ValueError(f"weights: expected at most {MAX_BYTES:,} bytes, got {size:,}; train a smaller model")
    results["bytes"] = size
    write_json(new / RESULTS, results)
    (new / CARD).write_text(card(results), encoding="utf-8")
    shutil.rmtree(config.package, ignore_errors=True)
    new.rename(config.package)


def best_cell(config: NanoConfig, folder: Path, which: str) -> tuple[Path, dict[str, Any]]:
    """Model folder and values of the finished cell that read ``config.tokens`` and has the fewest held-out bits."""
    found = [(path, values) for path, values in finished(folder, which) if _of_this_size(config, values)]
    if not found:
        raise FileNotFoundError(
            f"{folder}: expected a finished cell of the {which} with {config.tokens:.0e} tokens, found none; train it "
            f"with: kimi-linear study nano --models {which} --tokens {config.tokens:.0e} --folder {folder}"
        )
    path, values = min(found, key=lambda item: bits(item[1]))
    return path.with_suffix(""), values


def finished(folder: Path, which: str) -> list[tuple[Path, dict[str, Any]]]:
    """The finished cells of one model: file and values."""
    return [(path, json.loads(path.read_text(encoding="utf-8"))) for path in sorted(folder.glob(f"{which}-*.json"))]


def sweep(config: NanoConfig, folder: Path, which: str) -> list[dict[str, Any]]:
    """What was tried for a model: settings and held-out bits of every finished cell."""
    names = ("optimizer", "lr", "weight_decay", "tokens")
    same_model = [values for _, values in finished(folder, which) if values["settings"]["tiny"] == config.tiny]
    return [{**{n: v["settings"][n] for n in names}, **v["held_out"]} for v in same_model]


def bits(values: dict[str, Any]) -> float:
    """Mean of the held-out bits per byte of prose and code."""
    return sum(values["held_out"][kind] for kind in KINDS) / len(KINDS)


def _of_this_size(config: NanoConfig, values: dict[str, Any]) -> bool:
    return values["settings"]["tokens"] == config.tokens and values["settings"]["tiny"] == config.tiny


def card(results: dict[str, Any]) -> str:
    """MODEL_CARD.md of ``results``: nothing in it is written by hand but the words between the numbers."""
    nano, twin = results["nano"], results["twin"]
    train, settings = nano["data"]["train"], nano["settings"]
    times = settings["prose_times"]
    passes = nano["points"][-1]["tokens"] / (train["tokens"] + (times - 1) * train["prose_tokens"])
    lines = [
        "# kimi-linear-nano",
        "",
        f"A language model of {nano['parameters']:,} parameters that comes with the package ({results['bytes'] / 2**20:.1f} MiB "
        "of bf16). Three layers of four are Kimi Delta Attention, every fourth is full attention (MLA) without positions. It "
        "continues English prose and Python; it knows nothing, follows no instructions, and is no basis for decisions.",
        "",
        "```bash",
        'kimi-linear generate "Once upon a time"',
        "```",
        "",
        "## Held-out bits per byte",
        "",
        "Lower is better. The twin has full attention with rotary positions in every layer, the same number of parameters within "
        "1 %, the same tokens in the same order, and the same settings: the learning rate is the one that was best for the twin "
        "in a sweep.",
        "",
        "| model | parameters | prose | code |",
        "|---|---|---|---|",
        *(
            f"| {name} | {values['parameters']:,} | {values['held_out']['prose']:.4f} | {values['held_out']['code']:.4f} |"
            for name, values in (("nano", nano), ("twin", twin))
        ),
        "",
        _verdict(nano, twin),
        "",
        f"Rows of {nano['settings']['sequence_length']:,} tokens, bf16 weights, of "
        + " and ".join(f"{nano['data'][kind]['bytes']:,} bytes of {kind}" for kind in KINDS)
        + " that was never trained on. One seed each: differences of a few thousandths say nothing.",
        "",
        "## Training",
        "",
        f"{nano['points'][-1]['tokens'] / 1e6:,.0f} million tokens of a vocabulary trained on the text: {passes:.1f} times through its "
        f"{(train['bytes'] - train['prose_bytes']) / 1e6:,.0f} MB of code ({train['tokens'] - train['prose_tokens']:,} tokens) and "
        f"{passes * times:.1f} times through its {train['prose_bytes'] / 1e6:,.0f} MB of prose ({train['prose_tokens']:,} tokens). "
        f"{settings['batch_size']} rows of {settings['sequence_length']:,} tokens a step.",
        "",
        "| model | hardware | minutes | tokens/s | of the bf16 matmul ceiling | optimizer | learning rate |",
        "|---|---|---|---|---|---|---|",
        *(_training_row(name, values) for name, values in (("nano", nano), ("twin", twin))),
        "",
        "Tried: " + "; ".join(_tried(name, values) for name, values in (("nano", nano), ("twin", twin))) + ".",
        "",
        "| million tokens | nano, prose | nano, code | twin, prose | twin, code |",
        "|---|---|---|---|---|",
        *_curve(nano["points"], twin["points"]),
        "",
        "The curve is measured on a part of the held-out rows with the fp32 weights.",
        "",
        "## Texts",
        "",
        "| text | licence | stated in | trained on, KB | held out, KB |",
        "|---|---|---|---|---|",
        *(
            f"| {s['name']} | {s['licence']} | {s['evidence']} | {s['train_bytes'] / 1e3:,.0f} | {s['held_out_bytes'] / 1e3:,.0f} |"
            for s in results["sources"]
        ),
        "",
        "Held-out documents are whole works, modules or packages. Training documents that share more than 5 % of their runs of "
        "twelve words with them were dropped, as were documents that another one had said already.",
        "",
    ]
    return "\n".join(lines)


def _verdict(nano: dict[str, Any], twin: dict[str, Any]) -> str:
    said = []
    for kind in KINDS:
        gap = twin["held_out"][kind] - nano["held_out"][kind]
        who = "fewer" if gap > 0 else "more"
        said.append(f"{abs(gap):.4f} bits per byte {who} on {kind}")
    return f"The hybrid needs {' and '.join(said)} than full attention."


def _training_row(name: str, values: dict[str, Any]) -> str:
    pieces, settings = values["pieces"], values["settings"]
    hardware = " and ".join(sorted({piece["machine"] for piece in pieces}))
    minutes = sum(piece["seconds"] for piece in pieces) / 60
    last = pieces[-1]
    return (
        f"| {name} | {hardware} | {minutes:.1f} | {last['tokens_per_second']:,.0f} | {last['share']:.1%} | "
        f"{settings['optimizer']} | {settings['lr']:g} |"
    )


def _tried(name: str, values: dict[str, Any]) -> str:
    cells = (
        f"{c['optimizer']} {c['lr']:g} at {c['tokens'] / 1e6:,.0f} M tokens ({c['prose']:.3f}, {c['code']:.3f})"
        for c in values["sweep"]
    )
    return f"{name} with " + ", ".join(cells)


def _curve(nano: list[dict[str, float]], twin: list[dict[str, float]]) -> list[str]:
    theirs = {point["step"]: point for point in twin}
    return [
        f"| {point['tokens'] / 1e6:,.0f} | {point['prose']:.3f} | {point['code']:.3f} | "
        f"{theirs[point['step']]['prose']:.3f} | {theirs[point['step']]['code']:.3f} |"
        for point in nano
        if point["step"] in theirs
    ]
