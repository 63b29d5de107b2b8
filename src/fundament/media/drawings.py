"""SVG to pictures, where the `svg` extra is installed."""

import importlib.util
import io
import re
import subprocess
import sys

import numpy as np
from PIL import Image

from fundament.core import Media
from fundament.media.arrays import RGB, refusal

_SIDE_PIXELS = 1024
_MOST_BYTES = 1_000_000
_MOST_SECONDS = 10

# What could make the renderer open a file, or read a picture of any size.
_REFERS = re.compile(
    rb"""<!ENTITY | <!DOCTYPE[^>]*\[ | <\?xml-stylesheet | @import | <\s*(?:[\w.-]+:)?(?:image|feImage)\b
    | \bhref\s*=\s*["']?\s*(?![\s"'#]) | url\(\s*["']?\s*(?![\s"'#])""",
    re.IGNORECASE | re.VERBOSE,
)

# The renderer ends its process when it runs out of memory, so it has one of its own, with bounds.
_PROGRAM = f"""
import resource, sys
resource.setrlimit(resource.RLIMIT_AS, (2**30, 2**30))
resource.setrlimit(resource.RLIMIT_CPU, ({_MOST_SECONDS}, {_MOST_SECONDS}))
resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
from resvg_py import svg_to_bytes
drawn = svg_to_bytes(
    svg_string=sys.stdin.buffer.read().decode("utf-8-sig"),
    width={_SIDE_PIXELS},
    height={_SIDE_PIXELS},
    background="white",
    skip_system_fonts=True,
)
sys.stdout.buffer.write(bytes(drawn))
"""


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
    try:
        done = subprocess.run(  # noqa: S603 no word of the command is the caller's
            [sys.executable, "-I", "-c", _PROGRAM],
            input=media.content,
            capture_output=True,
            timeout=2 * _MOST_SECONDS,
            check=True,
        )
    except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
        raise refusal(media, "This SVG cannot be drawn: it is damaged, or takes too much to draw.") from error
    with Image.open(io.BytesIO(done.stdout), formats=("PNG",)) as image:
        return np.array(image.convert("RGB"))
