"""Regenerate the figures of gallery.md: run the code of the page with more epochs.

uv run docs/gallery.py
"""

import re
from io import BytesIO
from pathlib import Path

from PIL import Image

PAGE = Path(__file__).with_suffix(".md")


def main() -> None:
    """Run the page's code and save its figures with a reduced palette, which keeps the files small."""
    code = "".join(re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL))
    names: dict = {}
    exec(re.sub(r"^epochs = 1 +# (\d+).*", r"epochs = \1", code, flags=re.MULTILINE), names)
    folder = PAGE.with_suffix("")
    folder.mkdir(exist_ok=True)
    for name, axes in names["figures"].items():
        file = BytesIO()
        axes.figure.savefig(file, dpi=72, bbox_inches="tight")
        image = Image.open(file).convert("RGB")
        is_grey = image.convert("L").convert("RGB").tobytes() == image.tobytes()
        image.quantize(32 if is_grey else 256).save(folder / f"{name}.png", optimize=True)


if __name__ == "__main__":
    main()
