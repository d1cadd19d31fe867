"""How a sequence is cut into segments (segments.py): a rule of its length and the head counts, which needs no triton."""

from __future__ import annotations

from dataclasses import dataclass

PROCESSORS = 128
"""Programs that run side by side. One number for all GPUs (they have 108 to 148), so that results do not depend on it."""

MOST = 32
"""Segments of a sequence: each takes 2 us in ``combine`` on an H100, and 32 shorten a walk to 1/16."""


@dataclass(frozen=True, kw_only=True)
class Cut:
    """How sequences are cut: c chunks in min(most, c // least) segments, or in one where that is below ``FEWEST``."""

    most: int
    least: int = 8

    FEWEST = 4  # build and expand each walk c / segments chunks, and combine and two launches are not free

    def segments(self, chunks: int) -> int:
        """Of a sequence of ``chunks`` chunks. The kernels' ``segments_of`` computes the same."""
        count = min(self.most, chunks // self.least)
        return count if count >= self.FEWEST else 1


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A cut applied to one call: at most ``boundaries`` of them, those of each sequence beginning ``apart`` from each other.

    ``apart`` 0: those of a sequence begin at (its first chunk) // least, which leaves each room enough.
    """

    cut: Cut
    boundaries: int
    apart: int


def plan(cut: Cut, sequences: int, chunks: int, packed: bool) -> Plan:
    """The plan for ``sequences`` of ``chunks`` chunks in all (at most, if packed; the same for each, if not)."""
    if not packed:
        apart = cut.segments(chunks // max(sequences, 1)) - 1
        return Plan(cut=cut, boundaries=sequences * apart, apart=apart)
    by_sequence, by_chunk = sequences * (cut.most - 1), chunks // cut.least
    if cut.most < cut.FEWEST or by_chunk < cut.FEWEST:
        return Plan(cut=cut, boundaries=0, apart=0)
    if by_sequence <= by_chunk:
        return Plan(cut=cut, boundaries=by_sequence, apart=cut.most - 1)
    return Plan(cut=cut, boundaries=by_chunk, apart=0)


def choose_cut(v_heads: int, value_dim: int) -> Cut:
    """As many segments as fill the processors with slices of 64 of V; one segment where the heads fill them.

    A scan takes a fixed time per chunk while programs are fewer than processors. Cut in S, a sequence takes 2 / S of the
    time (build, then expand), so S is worth it from about four. Every slice reads all of a chunk's keys again, and the L2
    gives out no more in that time; so segments come in slices of 64, and whole sequences, of which there would be too few,
    in slices of 32. At most ``MOST``, as segments are combined one after the other.
    """
    return Cut(most=min(MOST, max(1, PROCESSORS // (v_heads * -(-value_dim // 64)))))


def may_be_cut(v_heads: int, value_dim: int) -> bool:
    """Whether these heads are so few that a sequence is cut once it is long enough."""
    return choose_cut(v_heads, value_dim).most >= Cut.FEWEST
