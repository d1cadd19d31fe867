"""``kimi-linear info``: what is installed, which implementation each operation would take, and what a preset costs."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from kimi_linear.cli.console import closing, count, memory, parse, stderr, stdout, table
from kimi_linear.cli.folders import existing_folder

if TYPE_CHECKING:
    from kimi_linear.config import ModelConfig


@dataclass(frozen=True, kw_only=True)
class InfoArgs:
    """Flags of ``info``."""

    preset: str | None = None
    """Show what this preset costs, such as "kimi-linear-48b-a3b" or "tiny/mla"; "list" names them all."""
    model: Path | None = None
    """Show what this model costs, from its config.json alone: a folder in the release layout, or a name of the hub, such
    as "owner/model"."""


def main(argv: Sequence[str]) -> None:
    """Parse, ask, print."""
    args = parse(InfoArgs, "info", argv, "Versions, devices, implementations; or what a preset costs.")
    since = time.monotonic()
    if args.model is not None:
        _costs(str(args.model), _config_of(args))
    elif args.preset is None:
        _machine()
    elif args.preset == "list":
        _presets()
    else:
        from kimi_linear.config import preset

        _costs(args.preset, preset(args.preset))
    closing(stderr(), {}, since)


def _machine() -> None:
    import platform
    from importlib.metadata import PackageNotFoundError, version

    import torch

    from kimi_linear import __version__
    from kimi_linear.ops.dispatch import AVAILABLE, STEP_OPS, OpFacts, choose_impl

    out = stdout()
    rows = [
        {"what": "kimi_linear", "version": __version__},
        {"what": "python", "version": platform.python_version()},
        {"what": "torch", "version": torch.__version__},  # its own word names the build: +cpu, +cu130
    ]
    for package in ("triton", "numpy", "safetensors", "transformers", "tokenizers", "tensorboard"):
        try:
            rows.append({"what": package, "version": version(package)})
        except PackageNotFoundError:
            rows.append({"what": package, "version": "not installed"})
    out.print(table(rows))
    devices = [{"device": "cpu", "what": platform.processor() or platform.machine(), "memory": None, "arch": None}]
    devices[0]["threads"] = str(torch.get_num_threads())
    for i in range(torch.cuda.device_count()):
        facts = torch.cuda.get_device_properties(i)
        arch = f"{facts.major}.{facts.minor}"
        devices.append(
            {
                "device": f"cuda:{i}",
                "what": facts.name,
                "memory": memory(facts.total_memory),
                "arch": arch,
                "threads": None,
            }
        )
    out.print()
    out.print(table(devices))
    cuda = torch.cuda.is_available()
    choices = []
    for op in AVAILABLE:
        step = op in STEP_OPS or op.startswith("recurrent")
        facts = OpFacts(
            op=op,
            device="cuda" if cuda else "cpu",
            arch=torch.cuda.get_device_capability() if cuda else None,
            dtype="bfloat16" if cuda else "float32",
            tokens=1 if step else 4096,
            key_dim=128,
            value_dim=128,
            needs_grad=not step,
        )
        choice = choose_impl(facts)
        choices.append({"operation": op, "impl": choice.impl, "why": choice.reason})
    out.print()
    out.print(table(choices))


def _presets() -> None:
    from kimi_linear.config import PRESETS
    from kimi_linear.engine.footprint import footprint

    rows = []
    for name, make in PRESETS.items():
        config, cost = make(), footprint(make())
        rows.append(
            {
                "preset": name,
                "layers": config.num_layers,
                "width": config.hidden_size,
                "vocabulary": config.vocab_size,
                "parameters": count(cost.parameters),
                "active": count(cost.active_parameters),
            }
        )
    stdout().print(table(rows))


def _config_of(args: InfoArgs) -> ModelConfig:
    from kimi_linear.config import from_release
    from kimi_linear.folder import CONFIG_FILE, read_config

    assert args.model is not None
    if args.preset is not None:
        raise ValueError(f"preset: expected no preset beside --model, got {args.preset!r}; leave one of them out")
    folder = existing_folder(args.model, "or name a preset: kimi-linear info --preset list", files=(CONFIG_FILE,))
    return from_release(read_config(folder))


def _costs(name: str, config: ModelConfig) -> None:
    from kimi_linear.config import baseline
    from kimi_linear.engine.footprint import footprint

    twin = baseline(config, "mla")
    ours, theirs = footprint(config), footprint(twin)
    rows = [
        {"": label, name: shown(ours), "all full attention": shown(theirs)}
        for label, shown in (
            ("parameters", lambda cost: f"{cost.parameters:,}"),
            ("active per token", lambda cost: f"{cost.active_parameters:,}"),
            ("weights", lambda cost: memory(cost.weight_bytes)),
            ("state per sequence", lambda cost: memory(cost.state_bytes)),
            ("cache per token", lambda cost: memory(cost.token_bytes)),
            ("context of 8K", lambda cost: memory(cost.context_bytes(2**13))),
            ("context of 128K", lambda cost: memory(cost.context_bytes(2**17))),
            ("context of 1M", lambda cost: memory(cost.context_bytes(2**20))),
        )
    ]
    out = stdout()
    out.print(f"{name}: {config.num_layers} layers ({_layers(config.layer_mixers)}), width {config.hidden_size:,}")
    out.print(table(rows))
    out.print("One sequence; weights and caches in bf16, recurrent states in fp32.", style="dim")


def _layers(mixers: Sequence[str]) -> str:
    return ", ".join(f"{mixers.count(kind)} {kind}" for kind in dict.fromkeys(mixers))
