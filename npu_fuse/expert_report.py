"""What `group_experts` tells: each block of experts, grouped or left and why."""

from __future__ import annotations

from dataclasses import dataclass, field

from npu_fuse.report import ProofFacts, Status


@dataclass(frozen=True)
class BlockReport:
    """What became of one block of experts. `path` is "" for the model itself."""

    path: str
    status: Status
    reason: str = ""
    experts: int = 0
    k: int = 0
    modes: tuple[str, ...] = ()
    """Of "eval", "train", "autocast": where the grouped form is used; elsewhere the block runs as it was."""
    source: str = ""
    """The grouped form, as Python."""
    proof: ProofFacts | None = None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class ExpertsReport:
    """Every block of experts that was found."""

    blocks: tuple[BlockReport, ...] = field(default=())

    def __str__(self) -> str:
        lines = [f"{len([b for b in self.blocks if b.status is Status.FUSED])} of {len(self.blocks)} blocks grouped"]
        for block in self.blocks:
            how = f"{block.experts} experts, k {block.k}, {'/'.join(block.modes)}" if block.modes else block.reason
            lines.append(f"  {block.path or '(the model)'}: {block.status}: {how}")
            lines += [f"    {note}" for note in block.notes]
        return "\n".join(lines)
