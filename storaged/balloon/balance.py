"""What a balance that storaged did not start can cost, in words. Pure."""

from __future__ import annotations

from storaged.core.model import Space
from storaged.units import format_size


def starves_metadata(space: Space) -> bool:
    """True when less is unallocated than metadata needs to be relocated.

    The kernel then makes a metadata chunk of the little there is, as small as 6 MiB, and may make the only other one
    read-only (btrfs_inc_block_group_ro, fs/btrfs/block-group.c).
    """
    return not space.mixed and space.unallocated < space.metadata_chunk * space.metadata_copies


def warning(space: Space, held: int) -> str:
    """What to say of the balance that `space` shows while the balloon holds `held` bytes; empty without one."""
    if not held or not space.exclusive_operation.startswith("balance"):
        return ""
    text = (
        "a balance that storaged did not start is running: it writes the balloon's extents in every chunk that it"
        f" relocates, so the host's image can grow by up to {format_size(held)}"
    )
    if starves_metadata(space):
        chunk = format_size(space.metadata_chunk * space.metadata_copies)
        text += (
            f"; less than a metadata chunk ({chunk}) is unallocated: if it relocates metadata too, the kernel can force"
            " the filesystem read-only; stop it with `btrfs balance cancel`, or balance data alone (-d)"
        )
    return text
