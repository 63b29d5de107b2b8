"""SVG to pictures, where the `svg` extra is installed.

The renderer ends its process when it runs out of memory, so it has one of its own.
"""

import importlib.util
import io
import re
from pathlib import Path

import numpy as np
from PIL import Image

from fundament.core import Media
from fundament.media.arrays import RGB, refusal
from fundament.media.bounded import bounded, feed

_SIDE_PIXELS = 1024
_MOST_BYTES = 1_000_000
_MOST_CPU_SECONDS = 10

# What could make the renderer open a file, or read a picture of any size. No part gives back what it took: a drawing of
# spaces would take minutes, in which the interpreter does nothing else.
_REFERS = re.compile(
    rb"""<!(?:ENTITY|ATTLIST|ELEMENT|NOTATION) | <!DOCTYPE[^><\[]*+\[ | <\?xml-stylesheet | @import
    | <\s*+(?:[\w.-]++:)?(?:image|feImage)\b
    | \bhref\s*+=\s*+["']?+\s*+(?![\s"'#]) | url\(\s*+["']?+\s*+(?![\s"'#])""",
    re.IGNORECASE | re.VERBOSE,
)


def draw(media: Media) -> RGB:
    """A drawing on white whose longer side has 1,024 pixels, uint8 `[height, width, 3]`.

    Raises:
        InputError: it cannot be drawn, refers to anything outside itself, or no renderer is installed.
    """
    if importlib.util.find_spec("resvg_py") is None:
        raise refusal(
            media, "SVG needs a package that this server lacks: pip install 'fundament[svg]'. Or send JPEG or PNG."
        )
    if len(media.content) > _MOST_BYTES:
        raise refusal(media, f"This SVG is larger than {_MOST_BYTES / 1e6:g} MB. Send it as PNG.")
    if _REFERS.search(media.content):
        raise refusal(media, "This SVG refers to something outside itself or holds pictures. Send it as PNG.")
    program = str(Path(__file__).with_name("resvg.py"))
    with bounded(program, _SIDE_PIXELS, seconds=_MOST_CPU_SECONDS, interest=media.interest) as process:
        assert process.stdout is not None
        feed(process, media.content)
        drawn = process.stdout.read()
        ended_well = process.wait() == 0
    if not ended_well:
        raise refusal(media, "This SVG cannot be drawn: it is damaged, or takes too much to draw.")
    with Image.open(io.BytesIO(drawn), formats=("PNG",)) as image:
        return np.array(image.convert("RGB"))
