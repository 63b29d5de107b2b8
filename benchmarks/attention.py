"""What the packed backbone does for the CPU kernels' sake, each beside what it would be without.

python benchmarks/attention.py

1. Keys in multiples of 16, reaching over the row's end, beside the row's own number of keys.
2. The same for causal rows, where the kernel could skip half of the scores instead.
3. Short rows in bundles, beside one call per row, and two ways to lay tokens in places.
4. Attention in two products beside the fused kernel, with the error of both.
5. The same of language models' causal rows, which share key heads.
6. Root-mean-square norms and rotations beside PyTorch's and the textbook's.
7. A product of a shape that oneDNN meets for the first time, beside the same again: why token numbers are rounded.
8. A residual fused into a product beside one that is added to its result: why large ones are not fused.
"""

import argparse
import itertools
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from statistics import median

import torch
import torch.nn.functional as F

from contest import machine, rounds, table
from fundament.backbone import attention
from fundament.backbone.attention import Scoring, attend
from fundament.backbone.causal import attend_last
from fundament.backbone.linear import Linear
from fundament.backbone.packed import BUNDLE_TOKENS, Packed, Run, group, pack
from fundament.backbone.positions import rotary_angles, rotate
from fundament.backbone.transformer import rms_norm

HEADS = ((12, 32), (12, 64))
CPU = torch.device("cpu")


def microseconds(work: Callable[[], object], n: int = 40) -> float:
    """The median time on its core, which other work on the machine disturbs less than the clock."""
    for _ in range(3):
        work()
    laps = []
    for _ in range(n):
        started = time.thread_time()
        work()
        laps.append(time.thread_time() - started)
    return 1e6 * median(laps)


def rows(lengths: list[int], heads: int, head_dim: int, dtype: torch.dtype) -> tuple[Packed, list[torch.Tensor]]:
    """Rows end to end, and random queries, keys and values for them."""
    packed = pack([torch.zeros(length, dtype=torch.int64).numpy() for length in lengths], CPU)
    qkv = torch.randn(len(packed.ids), 3, heads, head_dim).to(dtype)
    return packed, list(qkv.unbind(1))


def lanes() -> None:
    """Whole vector lanes of keys."""
    lines = []
    for heads, head_dim in HEADS:
        for length in (12, 31, 57, 100, 136, 250):
            packed, (q, k, v) = rows([length, 64], heads, head_dim, torch.bfloat16)
            run = Run(0, 1, length)
            own = microseconds(
                lambda q=q, k=k, v=v, n=length: F.scaled_dot_product_attention(
                    *(part[:n].transpose(0, 1)[None] for part in (q, k, v))
                )
            )
            reaching = microseconds(
                lambda q=q, k=k, v=v, packed=packed, run=run: attention._attend_run(q, k, v, packed, run, Scoring())
            )
            lines.append(
                (f"{heads} x {head_dim}", str(length), f"{own:.0f}", f"{reaching:.0f}", f"{own / reaching:.2f}")
            )
    table(
        "One row's attention in bfloat16, microseconds",
        ("heads x size", "tokens", "own keys", "multiples of 16", "x"),
        lines,
    )


def causal() -> None:
    """Lanes under a bias, beside the kernel that skips what a causal row does not see."""
    lines = []
    for heads, head_dim in HEADS:
        for length in (30, 64, 136, 250, 500):
            _, (q, k, v) = rows([length, 64], heads, head_dim, torch.bfloat16)
            skips = microseconds(
                lambda q=q, k=k, v=v, n=length: F.scaled_dot_product_attention(
                    *(part[:n].transpose(0, 1)[None] for part in (q, k, v)), is_causal=True
                )
            )
            hides = (torch.arange(length)[:, None] < torch.arange(-(-length // 16) * 16))[None, None]
            bias = torch.zeros(hides.shape).masked_fill(hides, float("-inf")).bfloat16()
            biased = microseconds(
                lambda q=q, k=k, v=v, n=length, bias=bias: F.scaled_dot_product_attention(
                    q[:n].transpose(0, 1)[None],
                    *(part[: bias.shape[-1]].transpose(0, 1)[None] for part in (k, v)),
                    attn_mask=bias,
                )
            )
            lines.append(
                (f"{heads} x {head_dim}", str(length), f"{skips:.0f}", f"{biased:.0f}", f"{skips / biased:.2f}")
            )
    table(
        "One causal row's attention in bfloat16, microseconds",
        ("heads x size", "tokens", "skipping", "biased lanes", "x"),
        lines,
    )


def bundles() -> None:
    """Short rows together."""
    lines = []
    for heads, head_dim in HEADS:
        for length in (6, 10, 14, 20):
            lengths = sorted(length + n % 3 for n in range(32))
            packed, (q, k, v) = rows(lengths, heads, head_dim, torch.bfloat16)

            def each(runs: tuple[Run, ...], q=q, k=k, v=v, packed=packed) -> float:
                divided = replace(packed, runs=runs, kept={})
                return microseconds(lambda: attend(q, k, v, divided, Scoring())) / len(packed.lengths)

            starts = itertools.pairwise(packed.bounds)
            alone = each(tuple(Run(start, 1, stop - start) for start, stop in starts))
            found = [each(group(lengths, bundle)) for bundle in (16, BUNDLE_TOKENS, 64)]
            lines.append(
                (
                    f"{heads} x {head_dim}",
                    f"{length}-{length + 2}",
                    f"{alone:.0f}",
                    *(f"{one:.0f}" for one in found),
                    f"{alone / found[1]:.2f}",
                )
            )
    table(
        "A short row's attention in bfloat16, microseconds per row",
        ("heads x size", "tokens", "a call each", "bundles of 16", str(BUNDLE_TOKENS), "64", f"x of {BUNDLE_TOKENS}"),
        lines,
    )
    assert group([5, 5])[0].row_lengths, "short rows are bundled"
    tokens = torch.randint(0, 272, (320,))
    lines = []
    for heads, head_dim in HEADS:
        q = torch.randn(272, 3 * heads, head_dim).bfloat16()[:, :heads]
        other, ours = microseconds(lambda q=q: q[tokens]), microseconds(lambda q=q: q.index_select(0, tokens))
        lines.append((f"{heads} x {head_dim}", f"{other:.0f}", f"{ours:.0f}", f"{other / ours:.1f}"))
    table("272 tokens laid in 320 places, microseconds", ("heads x size", "[]", "index_select", "x"), lines)


def products() -> None:
    """Two products, whichever this processor is served with, and how far both kernels are from exact numbers."""
    lines = []
    for heads, head_dim in (*HEADS, (16, 64)):
        for length in (31, 48, 64, 127, 256, 512, 1297):
            packed, exactly = rows([length], heads, head_dim, torch.float32)
            whole = [part[:length].double().transpose(0, 1)[None] for part in exactly]
            exact = F.scaled_dot_product_attention(*whole)[0].transpose(0, 1).flatten(1)
            q, k, v = (part.bfloat16() for part in exactly)
            found = {}
            whole_run = (q, k, v, packed, Run(0, 1, length), Scoring())
            mixed = torch.empty_like(q)
            for name, work in (
                ("fused", partial(attention._attend_run, *whole_run)),
                ("products", partial(attention._attend_run_in_products, *whole_run, mixed)),
            ):
                out = work()
                out = mixed.flatten(1) if out is None else out
                error = float((out[:length].double() - exact).norm() / exact.norm())
                found[name] = (microseconds(work), error)
            (fused, fused_error), (ours, error) = found.values()
            cells = (f"{fused:.0f}", f"{ours:.0f}", f"{fused / ours:.2f}", f"{fused_error:.1e}", f"{error:.1e}")
            lines.append((f"{heads} x {head_dim}", str(length), *cells))
    table(
        "One row's attention in bfloat16, microseconds, and the error against numbers before any is rounded",
        ("heads x size", "tokens", "fused", "products", "x", "error", "error"),
        lines,
    )


def languages() -> None:
    """Causal rows of a language model."""
    heads, kv_heads, head_dim = 16, 8, 128
    lines = []
    for dtype in (torch.bfloat16, torch.float32):
        for length in (140, 1024, 2048):
            q, k, v = (torch.randn(length, n, head_dim).to(dtype) for n in (heads, kv_heads, kv_heads))
            fused = microseconds(
                lambda q=q, k=k, v=v: F.scaled_dot_product_attention(
                    *(part.transpose(0, 1)[None] for part in (q, k, v)), is_causal=True, enable_gqa=True
                ),
                n=5,
            )
            served = microseconds(
                lambda q=q, k=k, v=v: attend_last(q, k, v, torch.empty_like(q), Scoring(causal=True)), n=5
            )
            name = f"{heads} of {kv_heads} x {head_dim}, {str(dtype).removeprefix('torch.')}"
            lines.append((name, str(length), f"{fused:.0f}", f"{served:.0f}", f"{fused / served:.2f}"))
    table(
        "A language model's causal row, microseconds",
        ("heads x size", "tokens", "fused", "as served", "x"),
        lines,
    )


def norms() -> None:
    """What every token of a Llama goes through between products."""
    lines = []
    for size in ((2048, 1024), (2048, 16, 128)):
        x, weight = torch.randn(size).bfloat16(), torch.randn(size[-1]).bfloat16()
        other = microseconds(lambda x=x, w=weight: F.rms_norm(x, w.shape, w, 1e-6))
        ours = microseconds(lambda x=x, w=weight: rms_norm(x, w, 1e-6))
        lines.append(("norm", " x ".join(map(str, size)), f"{other:.0f}", f"{ours:.0f}", f"{other / ours:.2f}"))
    x = torch.randn(2048, 16, 128).bfloat16()
    cosines, sines = rotary_angles(torch.arange(2048), 128, 10_000.0, torch.bfloat16)
    plain = torch.cat((sines[..., 64:], sines[..., 64:]), dim=-1)

    def textbook() -> torch.Tensor:
        first, second = x.chunk(2, dim=-1)
        return x * cosines + torch.cat((-second, first), dim=-1) * plain

    other, ours = microseconds(textbook), microseconds(lambda: rotate(x, cosines, sines))
    lines.append(("rotation", "2048 x 16 x 128", f"{other:.0f}", f"{ours:.0f}", f"{other / ours:.2f}"))
    table("Norms and rotations in bfloat16, microseconds", ("", "size", "plainly", "as served", "x"), lines)


def shapes() -> None:
    """Products of new shapes."""
    linear = Linear(torch.randn(1152, 384).bfloat16(), torch.randn(1152).bfloat16())
    lines = []
    for n_tokens in (9, 141, 333, 777, 1501):
        x = torch.randn(n_tokens, 384).bfloat16()
        started = time.thread_time()
        linear(x)
        first = 1e6 * (time.thread_time() - started)
        again = microseconds(lambda x=x: linear(x))
        lines.append((str(n_tokens), f"{first:.0f}", f"{again:.0f}", f"{first / again:.1f}"))
    table("A product 384 to 1,152 in bfloat16, microseconds", ("tokens", "first time", "again", "x"), lines)


def residuals() -> None:
    """Sums of products and residuals."""
    lines = []
    fused = torch.ops.mkldnn._linear_pointwise.binary
    for n_tokens, n_in, n_out in ((1024, 384, 384), (512, 768, 768), (512, 1024, 3072), (1312, 1024, 2736)):
        linear = Linear(torch.randn(n_out, n_in).bfloat16())
        x, residual = torch.randn(n_tokens, n_in).bfloat16(), torch.randn(n_tokens, n_out).bfloat16()
        ways = {
            "inside": lambda x=x, r=residual, w=linear.weight: fused(x, r, w, None, "add"),
            "after": lambda x=x, r=residual, product=linear: product(x).add_(r),
            "as served": lambda x=x, r=residual, product=linear: product.add(x, r),
        }
        found = rounds({name: partial(microseconds, way, 5) for name, way in ways.items()}, 5)
        inside, after, served = (median(laps) for laps in found.values())
        cells = (f"{inside:.0f}", f"{after:.0f}", f"{served:.0f}", f"{inside / after:.2f}")
        lines.append((f"{n_in} to {n_out}", str(n_tokens), f"{residual.nbytes / 2**20:.1f}", *cells))
    header = ("product", "tokens", "MiB", "inside", "after", "as served", "x")
    table("A residual added inside a product or after it in bfloat16, microseconds", header, lines)


def main() -> None:
    """Run them all."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    print(machine())
    torch.set_num_threads(1)
    with torch.inference_mode():
        lanes()
        causal()
        bundles()
        products()
        languages()
        norms()
        shapes()
        residuals()


if __name__ == "__main__":
    main()
