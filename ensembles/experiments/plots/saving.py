"""Pictures as files, whole and never over another."""

import io
from pathlib import Path

from matplotlib.figure import Figure

from ensembles.experiments.training.runs import make_folder, write_whole

__all__ = ["save_figure"]


def save_figure(figure: Figure, path: str | Path) -> Path:
    """Writes a figure in the format that the file's ending names, and overwrites nothing.

    Example::

        save_figure(plot_robustness(points), "robustness.pdf")

    Args:
        figure: Any figure.
        path: A new file, ending in .png, .pdf, .svg or another format of matplotlib. Its folder is
            made where there is none.

    Returns:
        The path.

    Raises:
        FileExistsError: If there is such a file.
        ValueError: If the ending names no format.
        OSError: If it cannot be written; there is no half-written file then.
    """
    path = Path(path)
    formats = figure.canvas.get_supported_filetypes()
    ending = path.suffix.lower().removeprefix(".")
    if ending not in formats:
        raise ValueError(f"{path.name} must end in a format, one of .{', .'.join(sorted(formats))}")
    buffer = io.BytesIO()
    figure.savefig(buffer, format=ending)
    make_folder(path.parent)
    write_whole(path, buffer.getvalue(), replace=False)
    return path
