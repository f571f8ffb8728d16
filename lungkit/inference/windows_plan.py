"""How many patches a device takes at once."""

from lungkit.inference.patches import patches_per_call


def windows_per_call(device_type: str, voxels: int) -> int:
    """:func:`patches_per_call` by the voxels of a patch."""
    return patches_per_call(device_type, (voxels,))
