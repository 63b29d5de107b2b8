"""Rows of late chunking: several texts as one, or one text by its sentences, read whole or in windows."""

import numpy as np

from fundament.backbone import chunking
from fundament.backbone.tokenizing import TextTokenizer
from fundament.core import Embed, Item
from fundament.errors import Fault, InputError, TooLongTogetherError


def joint_items(tokenizer: TextTokenizer, call: Embed, prompt: str, adapter: int) -> list[Item]:
    """One row for all texts of a call, or one per window, with the borders of the parts that it holds.

    Args:
        tokenizer: the model's own.
        call: what is asked.
        prompt: goes before the first text, or into every window.
        adapter: the place of the rows' adapter, or `BASE`.

    Raises:
        InputError: a text without tokens of its own, or a window of a size that is not served.
        TooLongTogetherError: texts longer than the context, without windows and `truncate`, or a text that is all cut.
    """
    several, texts = call.late_chunking == "inputs", call.texts
    if call.late_chunking_window is None:  # what lies behind the context is never read
        texts = [tokenizer.beginning(text, tokenizer.context) for text in texts]
    pieces = [[text] for text in texts] if several else [chunking.sentences(texts[0])]
    joint = tokenizer.encode_parts(pieces, prompt)
    n_parts = np.diff(joint.borders)
    if (several and not n_parts.all()) or not n_parts.any():
        message = "This text has no tokens of its own, so late_chunking has nothing to pool."
        index = int(np.argmin(n_parts)) if several else 0
        raise InputError(Fault(f"body -> input -> {index}", message))
    borders = joint.borders[np.append(n_parts > 0, True)]
    prefix, body = np.split(joint.ids, borders[:1])
    borders, n_special = borders - len(prefix), tokenizer.n_before + tokenizer.n_after
    n_around, n_whole = n_special + len(prefix), len(body)
    size = tokenizer.context if call.late_chunking_window is None else call.late_chunking_window
    if not (least := chunking.least_window(n_around)) <= size <= tokenizer.context:
        message = f"Input should be from {least} to {tokenizer.context} tokens."
        raise InputError(Fault("body -> late_chunking_window", message, input=size))
    room = size - n_around
    if n_whole > room and call.late_chunking_window is None:
        lost = np.flatnonzero(borders[:-1] >= room) if several else borders[:0]
        if not call.truncate or len(lost):
            raise TooLongTogetherError(
                n_tokens=n_around + n_whole,
                limit=tokenizer.context,
                more=sum(map(len, texts)) < sum(map(len, call.texts)),
                lost=int(lost[0]) if call.truncate else None,
            )
        body = body[:room]
    items: list[Item] = []
    for window in chunking.windows(len(body), room):
        parts, inside = chunking.cut(borders, window.first, window.last)
        ids = tokenizer.enclose(np.concatenate([prefix, body[window.start : window.stop]]))
        shift = tokenizer.n_before + len(prefix) - window.start
        features = {"ids": ids, "adapter": np.array(adapter), "parts": parts, "borders": inside + shift}
        first = not items
        items.append(
            Item(
                features=features,
                n_tokens=len(ids),
                n_counted=n_special + len(body) if first else 0,  # what windows share is counted once
                n_truncated=first and n_whole > len(body),
            )
        )
    return items
