"""A program: an SVG on standard input, a PNG of it on white on standard output, its longer side as long as asked."""

import sys

from resvg_py import svg_to_bytes

if __name__ == "__main__":
    side = int(sys.argv[1])
    text = sys.stdin.buffer.read().decode("utf-8-sig")
    drawn = svg_to_bytes(svg_string=text, width=side, height=side, background="white", skip_system_fonts=True)
    sys.stdout.buffer.write(bytes(drawn))
