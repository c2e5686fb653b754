"""Checks a file of weights of unknown origin before torch reads it."""

import zipfile
from pathlib import Path

# torch.save compresses nothing, and TorchScript only its code.
_COMPRESSIBLE = 1 << 24


def check_unpacked_size(path: Path) -> None:
    """
    Refuses a zip that unpacks to far more than its own size: torch would first take memory for all of that.

    Args:
        path (`Path`): a file for `torch.load`, which may also be of the older kinds that are no zips.

    Raises:
        ValueError: it unpacks to far more than its own size, or is a damaged zip.

    Example:

    ```python
    >>> from pathlib import Path
    >>> from epmvg_hf.model.weight_files import check_unpacked_size

    >>> check_unpacked_size(Path("TransVG_R50_unc.pth")) is None  # it may be loaded
    True
    ```
    """
    if not zipfile.is_zipfile(path):
        return
    try:
        with zipfile.ZipFile(path) as archive:
            unpacked = sum(member.file_size for member in archive.infolist())
    except (zipfile.BadZipFile, OSError, NotImplementedError) as error:
        raise ValueError(f"{path} is a damaged zip file: {error}.") from error
    size = path.stat().st_size
    if unpacked > size + _COMPRESSIBLE:
        raise ValueError(
            f"{path} is not loaded: its {size:,} bytes unpack to {unpacked:,}, and weights are not compressed."
        )
