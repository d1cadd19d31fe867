"""What can be wrong with a model folder: each kind of defect, what breaks where, and the way to mend it.

One table, so that ``kimi-linear check``, its page and ``convert --repair`` cannot say different things.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal


@dataclass(frozen=True, kw_only=True)
class Kind:
    """A kind of defect."""

    breaks: str
    """What goes wrong, and where."""
    repair: str
    """What mends it."""
    mendable: bool = True
    """Whether ``convert --repair`` does."""
    level: Literal["error", "warning"] = "error"
    """An error fails in a reader of the layout or computes something else there; a warning is something to know."""


@dataclass(frozen=True, kw_only=True)
class Defect:
    """One defect of a folder."""

    kind: str
    """Key of ``KINDS``."""
    places: tuple[str, ...]
    """Files, keys or tensors that have it."""
    found: str
    """What was expected and what is there."""
    mendable: bool | None = None
    """Whether this one can be repaired, where its kind does not decide."""

    @property
    def level(self) -> str:
        """ "error" or "warning"."""
        return KINDS[self.kind].level

    @property
    def can_mend(self) -> bool:
        """Whether ``convert --repair`` mends it."""
        return KINDS[self.kind].mendable if self.mendable is None else self.mendable

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        kind = KINDS[self.kind]
        return {
            "kind": self.kind,
            "level": self.level,
            "places": list(self.places),
            "found": self.found,
            "breaks": kind.breaks,
            "repair": kind.repair,
            "mendable": self.can_mend,
        }

    def __str__(self) -> str:
        first, *others = self.places
        return f"{first}{f' (and {len(others)} more)' if others else ''}: {self.found}"


AGAIN = "fetch or save the file again; its numbers are not in the folder"
REWRITE = "convert --repair writes it anew"

KINDS: dict[str, Kind] = {
    "config-missing": Kind(
        breaks="no reader can tell what the weights are of", repair="copy config.json from the original", mendable=False
    ),
    "config-unreadable": Kind(
        breaks="kimi_linear refuses the folder; other readers refuse it or run another model than was trained",
        repair="correct the key by hand, then check again", mendable=False,
    ),
    "unknown-key": Kind(
        breaks="the key may change the model; kimi_linear refuses it, other readers ignore it silently",
        repair="remove the key if it means nothing; if it means something, the model is not built here", mendable=False,
    ),
    "no-linear-attn-config": Kind(
        breaks="vLLM and SGLang take every layer for full attention and fail on the KDA weights; kimi_linear and transformers read layer_types instead, where there is one",
        repair="convert --repair writes linear_attn_config from the weights' names and shapes",
    ),
    "no-mla-use-nope": Kind(
        breaks="vLLM reads an absent key as false and stops at an assertion",
        repair="convert --repair writes true: transformers' layers and the released model have no position encoding",
    ),
    "absent-keys": Kind(
        breaks="readers fill an absent key differently (first_k_dense_replace: vLLM and SGLang 0, transformers 1; "
        "rms_norm_eps: 1e-6 and 1e-5; routed_scaling_factor: 1.0 and 2.446)",
        repair="convert --repair writes what the weights or the writer of the file settle",
    ),
    "null-keys": Kind(
        breaks="transformers refuses null for a number when it reads config.json",
        repair="convert --repair leaves the keys out and lets first_k_dense_replace say that all layers are dense",
    ),
    "other-spelling": Kind(
        breaks="vLLM and SGLang know only the release's name of the key and take their default instead",
        repair="convert --repair writes the release's name",
    ),
    "layer-lists-from-0": Kind(
        breaks="the lists count from 1: every reader puts full attention one layer too early and fails on the weights",
        repair="convert --repair adds 1 to each number",
    ),
    "layer-lists-wrong": Kind(
        breaks="readers build other layers than the weights are of and fail on loading, or leave layers at random",
        repair="convert --repair writes the lists that the weights' names show",
    ),
    "layer-types-wrong": Kind(
        breaks="transformers believes layer_types before linear_attn_config, builds other layers than the weights are of, and fails or leaves them at random; kimi_linear refuses the contradiction",
        repair="convert --repair writes the types that the weights' names show",
    ),
    "layer-types-default": Kind(
        level="warning", mendable=False,
        breaks="nothing fails: transformers' default for a new config has full attention at layers 5, 9, 13 (from 1), where "
        "the paper and the released model have it at 4, 8, 12 and at the last layer",
        repair="none: the weights were trained so. For a new model set layer_types",
    ),
    "no-full-attention": Kind(
        level="warning", mendable=False,
        breaks="transformers 5.17 to 5.23 crash on a forward pass with use_cache where no layer is full attention (its "
        "default layer_types with four layers or fewer)",
        repair="none for these weights: run with use_cache=False there. For a new model set layer_types",
    ),
    "dense-range-wrong": Kind(
        breaks="first_k_dense_replace disagrees with the weights: readers look for experts where there are none, or the reverse",
        repair="convert --repair writes what the weights' names show",
    ),
    "gate-rank-wrong": Kind(
        breaks="use_full_rank_gate disagrees with the weights: readers look for g_a_proj and g_b_proj where there is "
        "g_proj, or the reverse",
        repair="convert --repair writes what the weights' names show",
    ),
    "tied": Kind(
        level="warning",
        breaks="vLLM and transformers tie nothing in this architecture: their output projection stays at random and they "
        "generate noise; kimi_linear reads it as it is meant",
        repair="convert --repair writes the embedding a second time as lm_head.weight, and tie_word_embeddings false",
    ),
    "dtype-wrong": Kind(
        breaks="config.json names another dtype than the weights have, and readers cast to it: silently narrower, or twice "
        "the memory",
        repair="convert --repair writes the dtype of the weights",
    ),
    "no-weights": Kind(breaks="there is nothing to load", repair="fetch or save the weights again", mendable=False),
    "pickles": Kind(
        level="warning", mendable=False,
        breaks="a pickle runs code when it is opened; it was not opened, and no conversion copies it",
        repair="delete it",
    ),
    "outside": Kind(
        breaks="the file is a link that leads out of the folder, or the index names one that is not in it; no reader should follow",
        repair="fetch the folder again from a source that you trust", mendable=False,
    ),
    "damaged-file": Kind(breaks="no reader takes the file", repair=AGAIN, mendable=False),
    "truncated": Kind(breaks="no reader takes the file: the download or the save stopped early", repair=AGAIN, mendable=False),
    "shard-missing": Kind(breaks="the index lists a file that is not there", repair=AGAIN, mendable=False),
    "index-missing": Kind(
        breaks="several weight files and no index: transformers finds no weights, kimi_linear refuses to guess",
        repair=REWRITE,
    ),
    "index-damaged": Kind(breaks="transformers and kimi_linear cannot find the tensors", repair=REWRITE),
    "index-wrong": Kind(
        breaks="the index and the files disagree: readers that follow it miss tensors or take an outdated file",
        repair=f"{REWRITE} from the files' own tables",
    ),
    "duplicate": Kind(
        breaks="two files hold the tensor and readers differ in which one wins",
        repair="delete the file that does not belong", mendable=False,
    ),
    "missing": Kind(
        breaks="kimi_linear refuses the folder; transformers leaves the tensor at random values with a warning; vLLM and "
        "SGLang leave it as memory came",
        repair=AGAIN, mendable=False,
    ),
    "unknown-tensor": Kind(
        breaks="kimi_linear, vLLM and SGLang refuse it; transformers ignores it with a warning",
        repair="see what it is; if it is not part of the model, save the model again without it", mendable=False,
    ),
    "leftover-tensor": Kind(
        breaks="kimi_linear refuses a tensor that the model does not have", repair="convert --repair leaves it out: it says "
        "nothing that the others do not",
    ),
    "prefixed-names": Kind(
        breaks="every tensor is named as inside a wrapper (torch.compile, DataParallel): no reader finds any",
        repair="convert --repair removes the prefix",
    ),
    "dense-misnamed": Kind(
        breaks="transformers 5.17 to 5.23 save a dense layer as block_sparse_moe.*; vLLM, SGLang and kimi_linear look for mlp.*",
        repair="convert --repair renames them",
    ),
    "wrong-shape": Kind(
        breaks="readers refuse the tensor", repair="see which of config.json and the weights is the model's", mendable=False
    ),
    "flattened": Kind(
        breaks="the numbers are right and dims of one are missing or too many: kimi_linear refuses it, SGLang shards the wrong dim",
        repair="convert --repair gives it the release's shape",
    ),
    "narrow-gate": Kind(
        breaks="A_log and dt_bias belong in fp32: kimi_linear and vLLM hold them so and get the rounded numbers, and training "
        "in bf16 cannot take their small steps. transformers makes them so when it loads or trains in bf16",
        repair="convert --repair stores them in fp32; the digits that rounding took stay lost",
    ),
    "quantised": Kind(
        breaks="kimi_linear reads floating-point weights of 16 bits and more alone",
        repair="take the original weights", mendable=False,
    ),
    "not-finite": Kind(
        breaks="every output becomes NaN", repair="take an earlier checkpoint: the training run or the copy went wrong",
        mendable=False,
    ),
}  # fmt: skip
"""Every kind of defect that is told."""
